"""The runs of a comparison as jobs: which are there already, which go on, and which belong to something else and are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polopt.errors import CallError
from polopt.evidence.compare.folders import Damaged, Identity, inspect_external, inspect_run, read_record, set_aside
from polopt.evidence.compare.plan import Arm, Asked, external_words
from polopt.evidence.compare.schedule import Job

#: Versions of which a mixture is told.
TOLD = ("polopt", "commit", "torch", "python")


class Jobs:
    """Makes the jobs of a comparison in `folder`. versions: of what they will run with."""

    def __init__(self, asked: Asked, folder: Path, versions: Mapping[str, Any]) -> None:
        self.asked, self.folder, self.versions = asked, folder, versions
        self._identities: dict[int, tuple[Arm, Identity]] = {}  # by the arm, which is kept so that its id stays taken

    def place(self, arm: Arm) -> Path:
        """The folder of a contestant's runs."""
        return self.folder / "runs" / arm.entry.folder

    def refuse_others(self, arms: Sequence[Arm]) -> None:
        """Raise `CallError` for a run that was made with other settings; nothing is moved or started before."""
        for arm in arms:
            self.check_runs(arm, self.place(arm), self.asked.seeds)

    def finished(self, arm: Arm, seed: int) -> bool:
        """Whether a run is there already."""
        look = inspect_external if arm.resolved is None else inspect_run
        try:
            return look(self.place(arm) / f"s{seed}") == "finished"
        except Damaged:
            return False

    def check_runs(self, arm: Arm, root: Path, seeds: Sequence[int]) -> None:
        """Compare the runs that a contestant has already with what they are to be."""
        here = [s for s in seeds if (root / f"s{s}").exists()]
        identity = self.identity(arm) if here and arm.resolved is not None else None
        for seed in here:
            path = root / f"s{seed}"
            try:
                if identity is None:
                    if inspect_external(path) != "absent":
                        _refuse_other_program(path, self.program(arm, seed))
                elif command := read_record(path).get("command"):
                    raise CallError(
                        f"{path} holds a run of the program '{command}', {arm.name} is a method here; give another --out or name, "
                        "or move that folder away"
                    )
                elif inspect_run(path) != "absent":
                    identity.refuse_other(path, seed)
            except Damaged:
                continue

    def program(self, arm: Arm, seed: int) -> dict[str, Any]:
        """What an external program was asked for."""
        a = self.asked
        return {"command": arm.entry.command, "task": a.task_name, "budget": a.text, "seed": seed, "points": a.points}

    def make(self, arm: Arm, root: Path, seeds: Sequence[int]) -> list[Job]:
        """The runs of a contestant; finished ones are done already, damaged ones are set aside."""
        self.check_runs(arm, root, seeds)
        return [self._make_one(arm, root / f"s{seed}", seed) for seed in seeds]

    def _make_one(self, arm: Arm, path: Path, seed: int) -> Job:
        """One run."""
        a = self.asked
        job = Job(arm.name, seed, path, plan={"metric": a.metric, "unit": a.budget.unit, "budget": a.budget.amount})
        record: dict[str, Any] = {"contestant": arm.name, "seed": seed, "versions": self.versions}
        if arm.resolved is None:
            job.words = external_words(self.asked, arm.entry, seed, path.resolve())
            record |= self.program(arm, seed)
        else:
            first, *rest = arm.layers
            layers = [first._replace(values={**first.values, "seed": seed}), *rest]
            job.spec = {"method": arm.entry.method, "task": self.asked.task, "layers": [tuple(layer) for layer in layers]}
            identity = self.identity(arm)
            record |= {"identity": identity.fingerprint(seed), "code": identity.code, "data": dict(identity.data)}
        job.record = record
        try:
            state = inspect_external(path) if arm.resolved is None else inspect_run(path)
        except Damaged as error:
            job.notes.append(set_aside(path, str(error)))
            state = "absent"
        if state == "finished":
            job.state = "done"
        elif state == "partial" and arm.resolved is not None:
            before = read_record(path).get("versions") or self.versions
            if changed := [k for k in TOLD if before.get(k) != self.versions.get(k)]:
                was = ", ".join(f"{k} {before.get(k)} -> {self.versions.get(k)}" for k in changed)
                job.notes.append(f"{arm.name}, seed {seed}, was continued with other versions: {was}")
        return job

    def identity(self, arm: Arm) -> Identity:
        """What makes a contestant's runs its runs; looked up once."""
        if id(arm) not in self._identities:
            self._identities[id(arm)] = arm, Identity.of(arm.at(self.asked.seeds[0]))
        return self._identities[id(arm)][1]


def _refuse_other_program(path: Path, program: Mapping[str, Any]) -> None:
    record = read_record(path)
    for key, value in program.items():
        if record.get(key) != value:
            raise CallError(
                f"{path} holds a run of a program with {key} = {record.get(key)}, this comparison has {value}; give another --out, "
                "or move that folder away to run it anew"
            )


__all__ = ["Jobs"]
