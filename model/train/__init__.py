"""Training of a model: from one optimizer step to several runs at a time.

loop          the training loop of a run, with resume, guard, metrics and samples
step          one optimizer step: batch, gradients, update
optim         AdamW, learning rate, averaged weights
checkpoint    checkpoints that survive a kill at any moment
convert       export and import of weights
memory        predicted and measured memory, FLOPs and kernel calls of a step
heap          settings of the C library's heap
runs          several trainings in processes of their own
"""
