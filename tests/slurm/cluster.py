"""A Slurm for tests: munged, slurmctld and a slurmd for each node, as child processes.

All nodes are this machine. Free ports, `SLURM_CONF` and a munge key of its own keep it away from a
Slurm that runs here. Left out: accounting, cgroups, limits on memory and cores.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SEARCH_PATH = f"{os.environ['PATH']}:/usr/sbin"
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=30
MinJobAge=3600
SlurmdTimeout=15
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
PartitionName=other Nodes=ALL
"""
"""A requeued job waits for cred_expire; a dead node goes unnoticed for up to two SlurmdTimeout."""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 Gres=gpu:8 "
    "State=UNKNOWN\n"
)
START_SECONDS = 60
STOP_SECONDS = 20
POLL_SECONDS = 0.2


class Cluster:
    """A running one."""

    def __init__(self, folder: Path, nodes: tuple[str, ...]):
        """`folder` is new, and its path short: Slurm puts sockets there."""
        self.folder, self.nodes = folder, nodes
        self.environment = os.environ | {
            "PATH": SEARCH_PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Returns when every node takes jobs."""
        self.folder.chmod(0o711)  # munged refuses a socket that others cannot reach
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(1 + len(self.nodes))
        user = psutil.Process().username()
        values = {"host": host, "user": user, "folder": self.folder, "port": ports[0]}
        nodes = zip(self.nodes, ports[1:], strict=True)
        text = "".join(NODE.format(name=name, host=host, port=port) for name, port in nodes)
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values) + text)
        (self.folder / "state").mkdir()
        for number in range(8):  # Slurm gives out files; whether they are GPUs it does not ask
            (self.folder / f"gpu{number}").symlink_to(os.devnull)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"key-file": key, "socket": self.folder / "munge.socket"}
        files |= {f"{name}-file": self.folder / f"munge.{name}" for name in ("pid", "log", "seed")}
        self._start("munged", "-F", *(f"--{option}={file}" for option, file in files.items()))
        self.wait(files["socket"].exists, "munged answers")
        self.started = time.monotonic()
        self._start("slurmctld", "-D")
        for name in self.nodes:
            self.start_node(name)
        self.wait(lambda: set(self.node_states().values()) == {"idle"}, "all nodes are idle")

    def start_node(self, name: str) -> None:
        """Starts a node's daemon."""
        self._start("slurmd", "-D", "-N", name, label=name)

    def kill_node(self, name: str) -> None:
        """Ends a node's daemon and all that runs under it at once, as a power cut does."""
        self.kill_daemon(name)
        for process in self.processes(name):
            with suppress(psutil.Error):
                keeper = process.parent()
                if keeper is not None and keeper.name().startswith("slurmstepd"):
                    keeper.kill()
                process.kill()

    def kill_daemon(self, name: str) -> None:
        """Ends a node's daemon alone: Slurm gives the node up, and what runs there goes on."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def processes(self, node: str) -> list[psutil.Process]:
        """Those of job steps of this cluster on a node."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                variables = process.environ()
                is_ours = variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if is_ours and variables.get("SLURMD_NODENAME") == node:
                    found.append(process)
        return found

    def node_states(self) -> dict[str, str]:
        """Name to state, such as idle, alloc, down*."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def run(
        self, *command: str, folder: Path | None = None, variables: Mapping[str, str] | None = None
    ) -> str:
        """Runs one of Slurm's commands and returns what it prints."""
        done = subprocess.run(
            command,
            cwd=folder,
            env=self.environment | (variables or {}),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def submit(self, *words: str, folder: Path, variables: Mapping[str, str]) -> str:
        """Runs sbatch in a folder; the job gets the variables. Returns its number."""
        options = {"folder": folder, "variables": variables}
        return self.run("sbatch", "--parsable", *words, **options).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, key to value."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, is_so: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        """Waits for something to become true, as long as all daemons run."""
        ends = time.monotonic() + seconds
        while not is_so():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > ends:
                logs = [f"{f.name}:\n{f.read_text()[-2000:]}" for f in self.folder.glob("*.log")]
                message = f"not so in {seconds} s: {what}; daemons that ended: {ended}"
                raise AssertionError("\n".join([message, *logs]))
            time.sleep(POLL_SECONDS)

    def wait_for_end(self, job: str, seconds: float) -> dict[str, str]:
        """Returns the job once it has ended for good."""
        going = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        self.wait(lambda: self.job(job)["JobState"] not in going, f"job {job} has ended", seconds)
        return self.job(job)

    def stop(self) -> None:
        """Ends jobs and daemons."""
        if "slurmctld" in self._daemons:
            with suppress(AssertionError, subprocess.TimeoutExpired):
                self.run("scancel", "--user", str(os.getuid()))
                self.wait(lambda: not self.run("squeue", "--noheader"), "no jobs", STOP_SECONDS)
        for daemon in reversed(self._daemons.values()):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons.values():
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _start(self, command: str, *arguments: str, label: str | None = None) -> None:
        path = shutil.which(command, path=SEARCH_PATH)
        with (self.folder / f"{label or command}.log").open("ab") as log:
            self._daemons[label or command] = subprocess.Popen(
                [path, *arguments], env=self.environment, stdout=log, stderr=log
            )


def is_installed() -> bool:
    """Whether this machine has Slurm and munge."""
    return all(shutil.which(program, path=SEARCH_PATH) for program in PROGRAMS)


@contextmanager
def cluster(*nodes: str) -> Iterator[Cluster]:
    """A Slurm with nodes of these names, stopped when the block ends."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        running = Cluster(Path(folder), nodes)
        try:
            running.start()
            yield running
        finally:
            running.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
