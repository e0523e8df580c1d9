"""The stages of a trace over a tiny corpus, as a job would run them; their SAE and items' vectors lie on disk."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from curate.concepts import sae_files
from curate.corpus.example import ColumnMap
from curate.corpus.recipe import Recipe
from curate.curvature import test_vector
from curate.models.load import ModelSpec
from curate.runtime.cluster import ClusterSpec
from curate.runtime.gradient_cosine import CosineSpec, gradient_cosines
from curate.runtime.latent_influence import LatentSpec, latent_influence
from curate.runtime.manifest import SourceSpec, build_manifest
from curate.runtime.output import Output
from curate.runtime.reader import ReaderSpec
from curate.runtime.session import Session, session
from curate.scoring.directional.base import Reduction
from tests.conftest import conversation, write_jsonl
from tests.scoring.latent.setting import exact_model, random_sae, vector_above

ITEMS = ("one", "two", "three")


class Tracing:
    """Twelve rows in two files, parts of five rows; a random SAE and random test vectors of three items."""

    def __init__(self, root: Path, model: Path, rows: int = 12) -> None:
        self.root, self.model = root, ModelSpec(str(model), device="cpu")
        self.rows = [conversation(i) for i in range(rows)]
        write_jsonl(root / "corpus" / "a.jsonl", self.rows[:8])
        write_jsonl(root / "corpus" / "b.jsonl", self.rows[8:])
        with session(ClusterSpec(address="inline", cpus=1)):
            columns = ColumnMap(label="label", group="group")
            self.manifest, _, columns = build_manifest(
                SourceSpec(str(root / "corpus"), "jsonl", columns, 5, False), None
            )
        self.reader = ReaderSpec("jsonl", columns, self.model, 256, "quarantine")
        self.exact = exact_model(layers=3)  # the weights of the model at `model`
        self.vector = vector_above(self.exact, ITEMS)
        test_vector.save(self.vector, str(root / "vector"))
        sae_files.save(str(root / "sae"), random_sae())
        self.sae = sae_files.load(str(root / "sae"))

    def cosines(self, name: str = "cosines", token_budget: int = 200) -> Output:
        output = Output(str(self.root / name))
        urls = str(self.root / "sae"), str(self.root / "vector")
        spec = CosineSpec(self.reader, output, self.model, *urls, token_budget)
        with session(ClusterSpec(address="inline", cpus=1)) as here:
            gradient_cosines(spec, Recipe("gradient_cosines", {}), self.manifest, here, 0.1)
        return output

    def latents(
        self,
        name: str = "latents",
        where: Session | None = None,
        reduction: Reduction = "mean",
        token_latents: int | None = None,
        cosines: Output | None = None,
        least: tuple[float, ...] | None = None,
        sae: str = "sae",
        token_budget: int = 200,
    ) -> Output:
        output = Output(str(self.root / name))
        urls = str(self.root / sae), str(self.root / "vector")
        how = ("reverse_over_forward", reduction, token_budget, token_latents, cosines, least)
        spec = LatentSpec(self.reader, output, self.model, *urls, ITEMS, *how)
        recipe = Recipe("latent_influence", {})
        if where is not None:
            latent_influence(spec, recipe, self.manifest, where, 0.1)
        else:
            with session(ClusterSpec(address="inline", cpus=1)) as here:
                latent_influence(spec, recipe, self.manifest, here, 0.1)
        return output


def table(output: Output) -> pa.Table:
    """All parts, one after another."""
    return pa.concat_tables([pq.read_table(url) for _, url in sorted(output.parts().items())])
