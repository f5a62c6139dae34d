"""Configuration of small models that train on the CPU in seconds, shared by the tests."""

from model.config import preset

SMALL = dict(dim=32, heads=2, ffn=48, text_dim=32, batch=4, threads=1)


def small_config(**changes):
    return preset("tiny", **{**SMALL, **changes})
