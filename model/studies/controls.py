"""Study of the paper's negative controls: which residuals and remedies collapse."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from model.config import CONTENDERS
from model.studies.base import Jobs, Results, Study
from model.studies.outcomes import OUTCOMES, outcome_rows
from model.train.runs import Job


class Controls(Study):
    """Trainings with hard centring, attention only, gradient clipping, LayerScale and others."""

    def jobs(self, blocks: Sequence[int], seeds: int) -> Jobs:
        post, layerscale, mvsplit = (CONTENDERS[n] for n in ("post", "layerscale", "mvsplit"))
        variants = {
            "post": post,
            "post-default-init": {**post, "writer_init": "default"},
            **{f"post-clip-{c:g}": {**post, "clip": c} for c in (0, 0.1, 0.01)},
            "hard_center": {"residual": "hard_center", "writer_init": "zero"},
            "attention_only": {**mvsplit, "residual": "attention_only"},
            "attention_only-zero-init": {"residual": "attention_only", "writer_init": "zero"},
            "rezero": {"residual": "rezero", "writer_init": "default"},
            **{
                f"layerscale-{s:g}": {**layerscale, "init_scale": s}
                for s in (1e-2, 1e-3, 1e-4, 1e-5)
            },
            "mvsplit": mvsplit,
        }
        return {
            f"{name}-{n}-seed{seed}": Job(f"collapse{n}", {**changes, "seed": seed})
            for n in blocks
            for name, changes in variants.items()
            for seed in range(seeds)
        }

    def summarize(self, jobs: Jobs, out: Path) -> Results:
        return {"rows": outcome_rows(jobs, out)}

    def conclusions(self, results: Results) -> Iterator[str]:
        for outcome in OUTCOMES:
            names = [row["run"] for row in results["rows"] if row["outcome"] == outcome]
            yield f"{outcome}: {', '.join(names) or 'none'}"
