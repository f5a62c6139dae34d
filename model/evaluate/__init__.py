"""Evaluation of a trained model.

sample           images from captions, written as a grid
caption_match    the share of samples that show what their captions name
"""
