"""What a place tells of its stages by its layout alone, where no job's note does: sinks, single products, stores.

In: a URL. Out: stages. Knows no notes.
"""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Sequence

from connectors import storage
from connectors.dated import Dated, dated_files
from curate.corpus.coverage import parse_part
from curate.corpus.units import Manifest
from curate.runtime.output import load_manifest, read_recipe
from curate.runtime.status_stages import Stage, markers_stage, parts_stage, rate_of

MARKERS = {
    "factors": "factors.json",
    "training": "done.json",
    "sae": "done.json",
    "evaluation": "measures.json",
}
"""Kinds of product (of recipes) that are whole when this file is there."""
_STORE = {
    "concepts": None,
    "generations": None,
    "tokens": None,
    "activations": None,
    "latents": None,
    "latent_influence": None,
    "gradient_cosines": None,
    "item_latents": None,
    "queries": None,
    "studies": None,
    "test_vectors": None,
    "responses": None,
    "factors": "factors.json",
    "trainings": "done.json",
    "saes": "done.json",
    "evaluations": "measures.json",
}
"""Folders of a store, and the file that their products get last."""
_PAGES = ("retrain", "sae", "trace", "latents", "groups", "evaluation", "layer_stride")


def product(url: str) -> list[Stage]:
    """The stage of the one product at `url`; none where it is no product."""
    recipe = read_recipe(storage.join(url, "recipe.json"), url)
    if recipe is None:
        return []
    if recipe.kind in MARKERS:
        return [markers_stage(recipe.kind, {recipe.kind: url}, MARKERS[recipe.kind], "products")]
    of = load_manifest(url.rsplit("/", 1)[0])
    if of is None or storage.exists(storage.join(url, "parts")):
        return [parts_stage(recipe.kind, url, of, None)]
    return []


def sink_stages(url: str) -> list[Stage]:
    """The stages that a sink without notes shows."""
    stages = []
    whole = load_manifest(url)
    if whole is not None:
        claimed = read_recipe(storage.join(url, "ledger", "_recipe.json"), url)
        of = whole if claimed is None else whole.head(int(claimed.fields["rows"]))
        place = storage.join(url, "scores")
        if storage.exists(place):
            stages.append(parts_stage("score", place, of, of.rows))
        if claimed is not None:
            stages.append(ledger_stage(storage.join(url, "ledger"), of))
    for name in _PAGES:
        if storage.exists(storage.join(url, f"{name}.json")):
            stages.append(Stage(name, "reports", 1, 1, True, "files"))
    return stages + audit_stages(url)


def ledger_stage(ledger: str, of: Manifest) -> Stage:
    """A selection: a source file is done when its ledger is there."""
    files = {f.name.removesuffix(".parquet"): f for f in dated_files(ledger)}
    stops: dict[str, int] = defaultdict(int)
    for u in of.units:
        stops[u.key] = max(u.stop, stops[u.key])
    done = {key: stop for key, stop in stops.items() if key in files}
    rate, last = rate_of([(files[key].modified, stop) for key, stop in done.items()])
    rows, total = sum(done.values()), sum(stops.values())
    left = (total - rows) / rate if rate and rows < total else None
    return Stage("select", "rows", rows, total, rows == total, "files", ledger, 0, (), last, rate, left)


def audit_stages(sink: str) -> list[Stage]:
    """The audits of a sink: how many are committed, and how far one is that was begun."""
    root = storage.join(sink, "audits")
    begun = _folders(root, "plan.json")
    if not begun:
        return []
    done = _folders(root, "committed.json")
    detail = "" if begun <= done else f"begun: {', '.join(sorted(begun - done))}"
    stages = [Stage("audits", "audits", len(begun & done), len(begun), begun <= done, "markers", root, detail=detail)]
    for name in sorted(begun - done):
        of = load_manifest(storage.join(root, name))
        if of is not None:
            stages.append(parts_stage(f"audit {name}", storage.join(root, name, "scores"), of, of.rows))
    return stages


def audited(place: str) -> bool:
    """Are these the scores of a committed audit? It stays done when retention removes them."""
    return "/audits/" in place and storage.exists(storage.join(place.rsplit("/", 1)[0], "committed.json"))


def _folders(root: str, marker: str) -> set[str]:
    return {f.url.rsplit("/", 2)[-2] for f in storage.glob(f"{glob.escape(root)}/*/{marker}")}


def store_stages(url: str) -> list[Stage]:
    """Of a store: each folder of products, how many there are and how many of them are under way."""
    stages = []
    for folder, marker in _STORE.items():
        files = dated_files(storage.join(url, folder))
        if not files:
            continue
        by_product: dict[str, list[Dated]] = defaultdict(list)
        for f in files:
            by_product[f.name.split("/")[0].removesuffix(".json").removesuffix(".safetensors")].append(f)
        whole = [name for name, found in by_product.items() if marker is None or _has(found, marker)]
        last = max((f.modified for f in files if f.modified is not None), default=None)
        rows = sum(
            p.stop - p.start
            for f in files
            if "/parts/" in f.name and (p := parse_part(f.name.split("/parts/", 1)[1])) is not None
        )
        size = sum(f.size for f in files)
        detail = f"{size / 1e6:,.1f} MB" + (f", {rows:,} rows in parts" if rows else "")
        n = len(by_product)
        stages.append(
            Stage(folder, "products", len(whole), n, len(whole) == n, "files", None, last=last, detail=detail)
        )
    return stages


def _has(files: Sequence[Dated], marker: str) -> bool:
    return any(f.name.endswith(f"/{marker}") for f in files)
