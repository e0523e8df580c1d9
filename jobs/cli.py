"""The `curate` command: one subcommand a job. Options of a job are Hydra's, `name=value`."""

from __future__ import annotations

import importlib
import sys

from curate import __version__
from curate.errors import near

JOBS = {
    "run": "the main job: concept, generation, scores, selection, report",
    "concept": "make the configured concepts and keep them",
    "generate": "generate the base model's own responses and keep them",
    "fit": "fit curvature factors and make the test vectors of influence scorers",
    "score": "score every row of the source",
    "select": "rank by a score, write curated shards and the ledger",
    "report": "write the HTML report",
    "study": "see how far influence scores change when only every s-th block is tracked",
    "train": "fine-tune the model on the source's rows (a curated set, say)",
    "evaluate": "ask a model, with its adapters, the configured questions",
    "retrain": "train and evaluate on what each ranking would keep: does removing rows change the behaviour?",
    "sae": "train sparse autoencoders on the model's activations, layer by layer, and choose a layer",
    "latents": "find the SAE latents that tell two sets of rows apart, and keep them as concepts",
    "groups": "group rows by the SAE latents that fire on them; remove whole groups by a score",
    "trace": "for test items: which rows, SAE latents of them and tokens made the model answer so",
    "audit": "score what is new in a growing corpus, compare it with a baseline, alert",
    "plan": "say what a run will cost before it runs",
}
TOOLS = {
    "status": "how far a run is, from its output place (curate status s3://bucket/curated)",
    "submit": "submit a job to a Ray cluster (curate submit run …), and see after it: status, logs, stop",
}
"""Commands that are no jobs: their options are flags."""
HELP = f"""curate {__version__}: decide which training data a language model should see

usage: curate <job> [group=choice …] [option=value …]

jobs:
{chr(10).join(f"  {name:<9} {what}" for name, what in JOBS.items())}

tools:
{chr(10).join(f"  {name:<9} {what}" for name, what in TOOLS.items())}

examples:
  curate run                                            the embedded demo, into out/demo
  curate run source=files source.url=data/ concept=probe concept.probe.path=labelled.jsonl \\
             concept.probe.positive_label=bad selector.fraction=0.1 sink.url=s3://bucket/curated
  curate plan source=files source.url=data/             what it would cost
  curate run experiment=influence tuned.adapter=lora/    influence on the demo, by a finetuned model's gradients
  curate run --help                                     groups and their choices
  curate run --cfg job                                  every option with its value
"""


def main() -> None:
    """Run the job that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(HELP)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    if sys.argv[1] in ("-V", "--version", "version"):
        print(__version__)
        return
    job = sys.argv[1]
    if job not in JOBS and job not in TOOLS:
        print(f"curate: there is no job {job!r}{near(job, [*JOBS, *TOOLS])}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"curate {job}", *sys.argv[2:]]
    importlib.import_module(f"jobs.{job}").main()


if __name__ == "__main__":
    main()
