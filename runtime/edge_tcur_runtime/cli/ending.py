"""The end of `personalize`: the adapter put away, the result printed, the checkpoints removed, in an order
that a kill at any place leaves in a state from which the same command ends as it would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from edge_tcur_runtime.data import Dataset
from edge_tcur_runtime.errors import BadInputError, DiskError, EdgeError, IncompatibleError, IntegrityError
from edge_tcur_runtime.examine import examine
from edge_tcur_runtime.finished import (
    NOTE,
    Finished,
    identity_of,
    recall_finished,
    record_finished,
)
from edge_tcur_runtime.formats.adapter import Adapter, serialize_adapter
from edge_tcur_runtime.formats.bundle import Bundle
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.keeper import clear_checkpoints
from edge_tcur_runtime.origin import is_judged
from edge_tcur_runtime.output import Sink
from edge_tcur_runtime.settings import KeepSettings, PersonalizeSettings
from edge_tcur_runtime.state import MAX_NAME
from edge_tcur_runtime.store import Store
from edge_tcur_runtime.trial import Check, Incumbent, affordable, put_in_use

_UNJUDGED = "-unjudged"  # ending of a name


@dataclass
class Ending:
    """Ends one run.

    Attributes:
        keep: where its checkpoints are; store, name: where its adapter goes, and as what.
        sink: prints the result.
        keep_active: install the adapter, but leave the active one in use. accept_unjudged: put it in use also
            where nothing judged it and the active one was judged.
        incumbent: what the new adapter was compared with; bundle, budget: that it must work with, and bytes
            that this process may take for it. None puts it on trial, see `edge_tcur_runtime.trial`.
    """

    keep: KeepSettings
    store: Path
    name: str
    sink: Sink
    keep_active: bool = False
    incumbent: Incumbent | None = None
    bundle: Bundle | None = None
    budget: int | None = None
    accept_unjudged: bool = False
    _identity: Mapping[str, str] = field(default_factory=dict)

    def came_before(
        self, bundle: Bundle, start: Adapter | None, dataset: Dataset, settings: PersonalizeSettings
    ) -> bool:
        """Whether an earlier process ended this very run; its result is printed then."""
        self._identity = identity_of(bundle, start, dataset, settings)
        found = recall_finished(
            self.keep,
            self._identity,
            self.store,
            in_use=not self.keep_active,
            accept_unjudged=self.accept_unjudged,
        )
        if found is None:
            return False
        self.sink.note(NOTE)
        notes = found.result.get("notes")
        known = list(notes) if isinstance(notes, list) else []
        self.sink.result({**found.result, "notes": [*known, NOTE]}, found.report)
        return True

    def settle_name(self, judged: bool) -> str:
        """What the new adapter is called from now on: one that nothing judged leaves its name to one that was
        judged and has it in the store."""
        if judged or not self.store.is_dir():
            return self.name
        opened = Store.open(self.store, create=False)
        holder = opened.state.names.get(self.name)
        with suppress(IntegrityError):  # a damaged one has lost it
            if holder is not None and is_judged(opened.verified(holder)):
                self.name = f"{self.name[: MAX_NAME - len(_UNJUDGED)]}{_UNJUDGED}"
        return self.name

    def put_away(self, adapter: Adapter | None, result: Mapping[str, object], report: str) -> None:
        """Installs the adapter, prints the result and removes the checkpoints; `came_before` was called.

        Printed first: a process that is killed before it has printed leaves checkpoints, and with them its
        result to the next start.

        Args:
            adapter: None where nothing is installed.
            result: as JSON; report: for people.

        Raises:
            DiskError, BadInputError: see `Store`; the checkpoints stay. BadInputError too where another
                adapter was put in use since this one was compared.
            IntegrityError, IncompatibleError: it failed its health check; what was in use is in use again,
                and the checkpoints go, as the same run would end in the same way.
        """
        if adapter is not None:
            raw = serialize_adapter(adapter)
            record_finished(self.keep, Finished(digest_bytes(raw), self._identity, result, report))
            self._install(raw, withheld=result.get("withheld") is not None)
        self.sink.result(result, report)
        try:
            clear_checkpoints(self.keep)
        except (DiskError, BadInputError) as error:
            self.sink.note(f"the checkpoints could not be removed: {error}; the next start tries again")

    def _install(self, raw: bytes, *, withheld: bool) -> None:
        opened = Store.open(self.store)
        if self.keep_active or withheld:
            opened.install(raw, name=self.name)
            return
        seen = None if self.incumbent is None else self.incumbent.seen
        check: Check | None = None
        if self.bundle is not None and affordable(self.bundle, self.budget):
            check = partial(examine, self.bundle)
        try:
            put_in_use(opened, opened.install(raw), check, name=self.name, seen=seen)
        except (IntegrityError, IncompatibleError):
            with suppress(EdgeError):
                clear_checkpoints(self.keep)
            raise
        if check is None:
            self.sink.note("the budget has no room to check the new adapter: the first prediction does")
