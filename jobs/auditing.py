"""The audit with its settings: lease, plan, scores, conclusion, page, notice; one audit, or one a day of a backfill.

Turns Settings and what the stages found into what the library takes. Holds no mathematics.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from connectors import storage, webhook
from connectors.packages import expand
from curate.corpus.example import ColumnMap
from curate.corpus.recipe import Recipe
from curate.corpus.units import Manifest
from curate.errors import ConfigError, CorpusError, DeliveryError, DriftFound, LeaseError
from curate.reports import audit as page
from curate.runtime import audit as concluding
from curate.runtime.audit import Baseline, Conclusion, Summary
from curate.runtime.audit_files import Audit, Audits, remove_parts, write_json
from curate.runtime.audit_plan import Listing, Plan, by_day, kept_keys, listing, plan
from curate.runtime.audit_rows import load_rows
from curate.runtime.events import say
from curate.runtime.generate import GenerateSpec, generate
from curate.runtime.lease import Lease
from curate.runtime.manifest import SourceSpec
from curate.runtime.output import Output, claim, load_manifest, save_manifest
from curate.runtime.score import ScoreSpec, score

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline

NEW = "new"
_OF_THE_CORPUS = ("corpus", "generations", "generate_rows", "code")


class Auditing:
    """Of one run."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.config = pipeline, pipeline.config
        self.settings = pipeline.config.audit
        self.audits = Audits(storage.join(pipeline.sink, "audits"))
        s = self.config.source
        urls = pipeline.source_urls
        where = urls if len(urls) > 1 else urls[0]
        self.source = SourceSpec(where, s.format, s.columns, s.unit_rows, skip_broken_shards=True)

    def check(self) -> None:
        """Whatever can be wrong before anything is read.

        Raises:
            ConfigError: names the setting. DeliveryError: the webhook's address is not allowed.
        """
        if self.config.source.max_rows is not None:
            raise ConfigError(
                f"source.max_rows={self.config.source.max_rows} would leave rows out that no later audit looks at; an "
                f"audit takes all that is new"
            )
        if self.target is not None:
            webhook.check(self.target)
            self._secret()

    @cached_property
    def target(self) -> webhook.Target | None:
        """Where the notice goes.

        Raises:
            ConfigError: the variable that holds the address is not set.
        """
        h = self.settings.webhook
        if h.url_env is not None and h.url_env not in os.environ:
            raise ConfigError(f"audit.webhook.url_env names the variable {h.url_env}, which is not set")
        url = os.environ[h.url_env] if h.url_env is not None else h.url
        return webhook.Target(url, h.allowed_hosts, h.private_hosts, h.timeout, h.attempts) if url else None

    def _secret(self) -> bytes:
        name = self.settings.webhook.secret_env
        if not os.environ.get(name):
            raise ConfigError(f"audit.webhook signs with the secret in the variable {name}, which is not set")
        return os.environ[name].encode()

    def run(self) -> list[Summary]:
        """All that is due. The last line of standard output is the summary as JSON.

        Raises:
            DriftFound: a rule of severity `fail` fired; all is committed.
            LeaseError: another audit works here (audit.locked=fail), or has taken over.
            DeliveryError: the notice of an audit without failures did not arrive; the next run sends it again.
        """
        s = self.settings
        with ExitStack() as stack:
            try:
                lease = stack.enter_context(Lease(self.audits.at("lease.json"), s.lease_seconds, s.locked == "wait"))
            except LeaseError as e:
                if s.locked != "skip":
                    raise
                say(f"audit: skipped. {e}")
                print(json.dumps({"status": "skipped", "exit_status": 0, "rows": 0}))
                return []
            self.audits.mend(self.audits.committed())  # what a killed run did not come to
            made = self._backfill(lease) if s.days else self._new(lease)
            if made or not storage.exists(self.audits.at("index.html")):
                self._page()
            undelivered = self._notify()
        status = max((m.exit_status for m in made), default=0)
        for m in made:
            for f in m.findings:
                say(f"audit {m.label}: {f['severity'].upper()}: {f['text']}")
            for text in m.undecided:
                say(f"audit {m.label}: too few rows to conclude {text}")
        lines = [m.line() for m in made]
        last = lines[-1] if lines else concluding.empty(self.audits, self._last_plan)
        if len(lines) > 1:
            last = {"status": max((m.status for m in made), key=_gravity), "exit_status": status, "audits": lines}
        print(json.dumps(last))  # ASCII: a file's name may hold what no terminal can print
        bad = [f["text"] for m in made for f in m.findings if f["severity"] == "fail"]
        if not made and s.nothing_new == "repeat":
            bad = self._failed_before()
        if bad:
            shown = "; ".join(bad[:3]) + (f"; and {len(bad) - 3} more" if len(bad) > 3 else "")
            raise DriftFound(f"what is new is not as it was: {shown}. See {self.audits.at('index.html')}")
        if undelivered:
            raise undelivered
        return made

    _last_plan: Plan | None = None

    def _failed_before(self) -> list[str]:
        """What failed in the last audit that was no backfill."""
        ordinary = [c for c in self.audits.committed() if c["scope"] == NEW]
        last = self.audits.summary(f"{ordinary[-1]['number']:06d}") if ordinary else {"findings": []}
        return [f"audit {last['audit']}: {f['text']}" for f in last["findings"] if f["severity"] == "fail"]

    # what is new

    def _new(self, lease: Lease) -> list[Summary]:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        made = self._audit(listing(self.source), NEW, now, now, lease)
        return [made] if made else []

    def _backfill(self, lease: Lease) -> list[Summary]:
        """One audit for each day that has files nobody has audited."""
        assert self.settings.days is not None  # asked for
        found = listing(self.source)
        days = by_day(found.files, self.settings.day, *self.settings.days)
        if not days:
            first, last = self.settings.days
            say(f"audit: no file is of a day from {first} to {last}; audit.day says where a file's day stands")
        made = []
        for day, files in days.items():
            scope = Listing(found.connector, files)
            summary = self._audit(scope, f"day {day}", str(day), f"{day}T23:59:59Z", lease)
            made += [summary] if summary else []
        return made

    def _audit(self, found: Listing, scope: str, label: str, as_of: str, lease: Lease) -> Summary | None:
        """One audit of what is new among the files found; None: nothing is."""
        began = time.monotonic()
        committed = self.audits.committed()
        known = self.audits.known(committed)
        todo = plan(self.source, found, known, _looking)
        self._last_plan = todo
        for reason in todo.left_out:
            say(f"audit: left out, to be looked at again: {reason}")
        if not todo.manifest.rows:
            concluding.remember(self.audits, known, todo)
            say(f"audit: nothing new in {len(found.files):,} file(s)")
            return None
        audit = self.audits.unfinished(scope) or Audit(self.audits.next_number(), label, as_of, scope)
        self._prepare(audit, todo)
        say(
            f"audit {audit.name}: {todo.manifest.rows:,} new rows in {len({u.key for u in todo.manifest.units}):,} of "
            f"{len(found.files):,} file(s)"
        )
        base = self._baseline_place(audit, committed)  # refuse before the work
        seconds = self._score(audit, todo.manifest)
        reader = replace(self.pipeline.reader, format=todo.manifest.format)
        end = Conclusion(self.audits, audit, self.settings, reader, todo, began, seconds)
        summary = concluding.conclude(end, lambda columns: self._baseline(base, committed, columns), lease.check)
        needed = [summary.baseline] if summary.baseline != concluding.SELF else []
        needed.append(f"{min([c['number'] for c in committed] + [audit.number]):06d}")
        concluding.settle(self.audits, known, todo, self.settings.keep, needed)
        return summary

    def _prepare(self, audit: Audit, todo: Plan) -> None:
        """Write the plan. Of an audit that was killed, parts of files that have changed since are not its any more."""
        folder, output = self.audits.folder(audit), self.audits.scores(audit)
        before = load_manifest(folder)
        if before is not None:
            keep = kept_keys(before, todo.manifest)
            outputs = (output, Output(storage.join(folder, "generations")))
            dropped = sum(remove_parts(o, lambda key: key not in keep) for o in outputs)
            say(f"audit {audit.name}: going on where a killed run stopped", parts_dropped=dropped)
        self.audits.begin(audit)
        save_manifest(folder, todo.manifest)
        corpus = self.audits.at("corpus")
        first = load_manifest(corpus)
        if first is None:
            first = todo.manifest
            save_manifest(corpus, first)
        # What the corpus is to recipes and to curvature: that of the first audit, for all audits alike.
        self.pipeline._source = (first, self._columns(todo.manifest))
        self.pipeline.scores_place = Output(self.audits.url)  # whose recipe all audits share

    def _columns(self, manifest: Manifest) -> ColumnMap:
        """The layout is decided once, by the first audit: later files that lack a column are bad rows, not an error."""
        stored, asked = Output(self.audits.url).recipe(), self.source.columns
        if stored is not None:
            return replace(asked, layout=stored.fields["corpus"]["columns"]["layout"])
        with_columns = [f for f in manifest.files if f.columns]
        if not with_columns:
            raise CorpusError(f"no file of {self.source.url!r} has a row that can be read; nothing was audited")
        return asked.resolve(with_columns[0].columns, with_columns[0].url)

    # scores

    def _score(self, audit: Audit, manifest: Manifest) -> float:
        """Score the new units, as the job `score` would; returns the seconds. Bad rows are a rule's business."""
        p, output = self.pipeline, self.audits.scores(audit)
        recipe = p.score_recipe
        claim(self.audits.at("recipe.json"), recipe, self.audits.url)
        reader = replace(p.reader, format=manifest.format)
        if p.needs.generated:
            place = Output(storage.join(self.audits.folder(audit), "generations"))
            some = manifest.head(self.config.source.generate_rows)
            p.timed("generate", generate(GenerateSpec(reader, p.sampling, place), recipe, some, p.session, 1.0))
            reader = replace(reader, generations=place.url)
        places = (p.influence.model, p.influence.urls) if p.needs.derivatives else ()
        budgets = p.session.token_budget, p.session.gradient_token_budget
        spec = ScoreSpec(reader, p.scorer_options, output, *budgets, *places)
        done = score(spec, recipe, manifest, p.concept_list, p.session, 1.0)
        p.timed("audit", done)
        return done.seconds

    def _baseline_place(self, audit: Audit, committed: Sequence[dict[str, Any]]) -> tuple[str, Output] | None:
        """(name, scores) of what `audit.baseline` names; None: there is no audit yet.

        Raises:
            ConfigError: it names nothing, or its scores are gone. RecipeError: they are of another recipe.
        """
        wanted = str(self.settings.baseline)
        if "/" not in wanted:
            found = self.audits.find(wanted, committed, audit)
            if found is None:
                return None
            name = f"{found['number']:06d}"
            output = self.audits.scores(name)
            if not output.parts():
                raise ConfigError(
                    f"the baseline {wanted!r} has no score parts at {output.url} (retention may have removed them); "
                    f"choose another audit.baseline"
                )
            return name, output
        url = expand(wanted).rstrip("/")
        for output in (Output(url), Output(storage.join(url, "scores"))):
            stored = output.recipe()
            if stored is not None and output.parts():
                _comparable(self.pipeline.score_recipe).refuse_other(_comparable(stored), output.url)
                return url, output
        raise ConfigError(f"audit.baseline={wanted} holds no scores (a recipe.json beside parts/)")

    def _baseline(
        self, place: tuple[str, Output] | None, committed: Sequence[dict[str, Any]], columns: Sequence[str]
    ) -> Baseline:
        """Its rows, and the labels and languages that are nothing new."""
        if place is None:
            return Baseline(concluding.SELF, None)
        name, output = place
        labels, spoken = concluding.heard_before(committed)
        rows = load_rows(output, columns, self.settings.by, self.settings.day)
        return Baseline(name, rows, labels | rows.labels.keys(), spoken if committed else None)

    # what is said

    def _page(self) -> None:
        history = self.audits.mend(committed := self.audits.committed())
        if history is not None:
            latest = self.audits.summary(f"{committed[-1]['number']:06d}")
            limits = tuple(sorted({r.limit for r in self.settings.rules if (r.measure, r.op) == ("psi", "above")}))
            told = (committed, history.to_pylist(), latest, self._facts(), limits)
            data = page.AuditPage(self.config.source.name, *told)
            storage.write_atomic(self.audits.at("index.html"), page.build(data).encode("utf-8"))

    def _facts(self) -> tuple[tuple[str, str], ...]:
        s = self.settings
        rules = tuple(("rule", f"{r.told}: {r.severity}") for r in s.rules)
        return (("source", ", ".join(self.pipeline.source_urls)), ("baseline", str(s.baseline)), *rules)

    def _notify(self) -> DeliveryError | None:
        """Send the notices that are due and were not delivered yet; the first failure, said and returned."""
        waiting = [c for c in self.audits.committed() if c["notify"]]
        if not waiting or self.target is None:
            return None
        told = self.audits.notified()
        failed: DeliveryError | None = None
        for c in waiting:
            name = f"{c['number']:06d}"
            if name in told or failed:
                continue
            summary = Summary(**self.audits.summary(name))
            body = json.dumps({"audits": self.audits.url, **summary.line()}).encode()
            try:
                attempts = webhook.deliver(self.target, self._secret(), body, f"{name}-{c['committed']}")
            except DeliveryError as e:
                say(f"WARNING: audit {name} is committed, but nobody was told; the next audit tries again. {e}")
                failed = e
                continue
            write_json(storage.join(self.audits.folder(name), "notified.json"), {"attempts": attempts})
        return failed


def _gravity(status: str) -> int:
    return ("baseline", "fine", "warn", "fail").index(status)


def _looking(done: int, of: int) -> None:
    if of > 20 and done % max(1, of // 10) == 0:
        say(f"audit: {done}/{of} files looked into")


def _comparable(recipe: Recipe) -> Recipe:
    """What two score places must have in common for their scores to be compared."""
    return Recipe(recipe.kind, {k: v for k, v in recipe.fields.items() if k not in _OF_THE_CORPUS})
