"""The processes of rule train: one, or several ranks that train one model together, on one machine or more.

A rank is this module as a program, `python -m cohortvi.inference.launch JOB.json`, told by RANK, WORLD_SIZE, LOCAL_RANK
and MASTER_ADDR, as torchrun sets them: torchrun can start it too. On several machines of a Slurm job srun starts, on
each, this module with `--node`, which starts the ranks there.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cohortvi import log
from cohortvi.config import Model
from cohortvi.files import read_json, write_json, write_table
from cohortvi.inference.checkpoint import forget_other_runs, run_folder, save_model
from cohortvi.inference.mapping import content
from cohortvi.inference.prepare import deciding
from cohortvi.inference.train import fit
from cohortvi.typed import build

PATIENCE = 60.0  # seconds that ranks have to end by themselves after one has failed
PACKAGES = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """A training run: what rule train gives its script, JSON-able."""

    train: list[str]  # manifests
    validation: list[str]
    outputs: dict[str, str]  # model, facts, history: files to write
    config: dict[str, Any]  # of the model
    sheet: dict[str, dict[str, Any]]
    seed: int
    code: str
    checkpoints: str  # prefix of the folder
    events: str  # folder for TensorBoard, if the model's settings ask for it
    log: str
    threads: int  # of all ranks on a machine

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie: a folder for all that decides which model comes out."""
        shards = [read_json(path)["content"] for path in (*self.train, *self.validation)]
        reference = build(Model, self.config).reference
        known = None if reference is None else content(reference)
        return run_folder(self.checkpoints, deciding(self.config), self.sheet, self.seed, self.code, shards, known)


def train(job: Job, *, ranks: int, nodes: int) -> None:
    """Train the model of a job by so many ranks, on so many machines of a Slurm job, and write it.

    SIGTERM and SIGUSR1 are passed on to the ranks. Errors: those of `fit` if there is one rank; SystemExit with the
    status of the rank that failed, whose error is in the log; 143 after SIGTERM; ValueError for ranks that cannot be
    spread evenly.
    """
    if ranks <= 1:
        work(job)
        return
    if ranks % nodes:
        raise ValueError(
            f"rule train: found {ranks} GPUs on {nodes} nodes; expected as many on each. Change the resources "
            "train:gpu or train:nodes"
        )
    path = job.folder / "job.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(asdict(replace(job, threads=max(1, job.threads * nodes // ranks))), path)
    if nodes > 1:
        program = [*_program(path), "--node", str(ranks // nodes), socket.gethostname(), str(_free_port())]
        # Our own step has one task; what srun finds of it in the environment would be taken for this one's wishes.
        step = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
        status = run([*step, *program], [{}])
    else:
        status = run(_program(path), _places(ranks, 0, 1, "127.0.0.1", _free_port()))
    if status:
        sys.exit(status)


def work(job: Job) -> None:
    """Train as the rank that the environment names, alone if it names none; rank 0 writes the model."""
    shards = [[Path(path) for path in paths] for paths in (job.train, job.validation)]
    folder, model = job.folder, build(Model, job.config)
    options = {"seed": job.seed, "checkpoints": folder, "threads": job.threads}
    events = Path(job.events) if model.tensorboard else None
    vae, history, facts = fit(*shards, model, sheet=job.sheet, events=events, **options)
    if os.environ.get("RANK", "0") == "0":
        write_table(history, job.outputs["history"])
        save_model(vae, facts, job.outputs["model"], job.outputs["facts"])
        forget_other_runs(folder, job.checkpoints)


def run(command: Sequence[str], environments: Sequence[dict[str, str]]) -> int:
    """Run a command once in each environment, at the same time; return 0, or the status of the first that failed.

    The others of a failed one lose it at their next step and end; those that do not within PATIENCE are killed. Signals
    are passed on.
    """
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGES), os.environ.get("PYTHONPATH")]))}
    started = [subprocess.Popen(command, env=os.environ | paths | more) for more in environments]

    def pass_on(number: int, _: object) -> None:
        for process in started:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    while True:
        statuses = [process.poll() for process in started]
        failed = [status for status in statuses if status]
        if failed or None not in statuses:
            break
        time.sleep(0.2)
    for process in started:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
    return failed[0] if failed else 0


def _program(path: Path) -> list[str]:
    return [sys.executable, "-m", "cohortvi.inference.launch", str(path)]


def _places(ranks: int, node: int, nodes: int, address: str, port: int) -> list[dict[str, str]]:
    """Return what each rank of a machine is told, as torchrun tells it."""
    common = {"WORLD_SIZE": str(ranks * nodes), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return [common | {"RANK": str(node * ranks + at), "LOCAL_RANK": str(at)} for at in range(ranks)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def main() -> None:
    """Be a rank; or, with `--node RANKS ADDRESS PORT` under srun, the ranks of a machine."""
    path, *more = sys.argv[1:]
    if more:
        _, ranks, address, port = more
        node, nodes = (int(os.environ[name]) for name in ("SLURM_NODEID", "SLURM_NNODES"))
        sys.exit(run(_program(Path(path)), _places(int(ranks), node, nodes, address, int(port))))
    job = Job(**read_json(path))
    log.start(job.log, mode="a", errors_only=os.environ["RANK"] != "0")
    work(job)


if __name__ == "__main__":
    main()
