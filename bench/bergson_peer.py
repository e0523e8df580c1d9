"""bergson as a peer: the fit of its EK-FAC factors on rows that are tokenised here.

In: a model, names of layers, tokenised rows. Out: files in a temporary folder that goes with the call. It installs
without torchvision and bitsandbytes (`pip install --no-deps bergson torchopt natsort petname simple-parsing
docstring-parser ml_dtypes`), which it asks for and does not import here. Batches by token budget, as curate's.

Conventions: L is the sum over tokens; A and B are means over the positions that carry a loss (tokens="loss" in curate),
δ at other positions is not counted in B; labels are sampled from the model.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bergson.config.config import HessianConfig, IndexConfig
from bergson.data import allocate_batches
from bergson.hessians.hessian_approximations import fit_factored_hessians
from datasets import Dataset

from curate.corpus.render import Rendered


def fit(model: Any, names: Sequence[str], rows: Sequence[Rendered], token_budget: int) -> None:
    """Covariances, eigenvectors and corrected eigenvalues of the layers `names`."""
    # The backward must begin somewhere. (bergson's own set-up asks for the embedding's gradient, which costs more.)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    prefix = next(name for name, module in model.named_modules() if module is model.base_model) + "."
    ids = [row.input_ids[: row.end] for row in rows]
    first = [max(row.start, 1) for row in rows]
    columns = {
        "input_ids": ids,
        "labels": [[-100] * start + row[start:] for row, start in zip(ids, first, strict=True)],
        "length": [len(row) for row in ids],
    }
    with tempfile.TemporaryDirectory(prefix="bergson-") as folder:
        config = IndexConfig(run_path=str(Path(folder) / "run"), precision="fp32", token_batch_size=token_budget)
        os.makedirs(config.partial_run_path)
        fit_factored_hessians(
            model,
            Dataset.from_dict(columns),
            config,
            HessianConfig(method="kfac", ev_correction=True),
            target_modules={name.removeprefix(prefix) for name in names},
            attention_cfgs={},
            batches=allocate_batches(columns["length"], token_budget),
            path=str(config.partial_run_path),
            do_eigendecomposition=True,
        )
