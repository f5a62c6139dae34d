"""Training steps of a model on one batch that does not change, for measurements."""

import torch

from model.config import Config
from model.data import open_dataset
from model.nn.dit import build
from model.train.memory import LiveBytes
from model.train.optim import make_optimizer
from model.train.step import Batch, compute_gradients, draw_batch, gradient_norm, prepare, update


class FixedBatchTraining:
    """A model with its optimizer on a device, and a batch that does not change."""

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, prepare(config)
        self.model = build(config, self.device)
        self.optimizer = make_optimizer(self.model, config)
        random = config.data == "latents" and not config.data_path
        self.dataset = None if random else open_dataset(config)
        self.batch = self.draw(0)

    def draw(self, step: int) -> Batch:
        """Return a batch of the data, or of random latents if the configuration has no folder."""
        if self.dataset is not None:
            return draw_batch(self.config, self.dataset, step)
        c, generator = self.config, torch.Generator().manual_seed(step)
        image = (c.batch, c.channels, c.size, c.size)
        x0, x1 = (torch.randn(image, generator=generator) for _ in range(2))
        text = torch.randn(c.batch, c.text_tokens, c.text_dim, generator=generator)
        return Batch(x0, x1, torch.rand(c.batch, generator=generator), text)

    def gradients(self) -> None:
        compute_gradients(self.config, self.model, self.batch, self.device)

    def update(self) -> None:
        """Take the norm of the gradients, clip them and update with AdamW."""
        update(self.config, 0, self.optimizer, gradient_norm(self.optimizer))

    def step(self) -> None:
        self.gradients()
        self.update()

    def synchronize(self) -> None:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure_peak(self) -> int:
        """Return the peak bytes of tensors in a step, states of model and optimizer included.

        On a CPU they are counted at PyTorch's dispatcher, which a compiled graph bypasses.
        """
        if torch.device(self.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
            return torch.cuda.max_memory_allocated(self.device)
        with LiveBytes() as live:
            self.step()
        moments = [t for s in self.optimizer.state.values() for t in s.values()]
        states = [*self.model.parameters(), *self.model.buffers(), *moments]
        return live.peak + sum(t.nbytes for t in states)
