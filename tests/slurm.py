"""A real one-node Slurm for the tests: munge, controller and node daemon from Debian's packages, no accounting."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")


def installed() -> bool:
    """Whether Slurm's programs are here, and we may run them: the daemons want root."""
    path = os.environ["PATH"] + ":/usr/sbin"
    return os.geteuid() == 0 and all(shutil.which(program, path=path) for program in NEEDED)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Slurm:
    """Starts in `folder`; `environment` is what commands need to find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().split(".")[0]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin"
        self.daemons: list[subprocess.Popen] = []
        self.controller: subprocess.Popen | None = None

    def __enter__(self) -> "Slurm":
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        munge = self.folder / "munge.socket"
        # --force: the folder of a test is not owned as munge would like.
        files = {"key-file": key, "socket": munge, "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{k}={self.folder / v}" for k, v in files.items()]
        seed = f"--seed-file={self.folder / 'munged.seed'}"
        self._daemon("munged", "--foreground", "--force", *options, seed)
        _until(munge.exists, "munged")
        (self.folder / "slurm.conf").write_text(self._conf(munge))
        self.start_controller()
        self._daemon("slurmd", "-D", "-f", str(self.folder / "slurm.conf"))
        _until(lambda: "idle" in self.run("sinfo", "-h", "-o", "%t", check=False), "a node that is idle")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.run("scancel", "--partition=debug", check=False)
        self.stop_controller()
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:  # slurmd minds its last jobs
                daemon.kill()
                daemon.wait()

    def start_controller(self) -> None:
        """Starts slurmctld; after a stop it goes on from its saved state."""
        with (self.folder / "slurmctld.out").open("a") as out:
            self.controller = subprocess.Popen(
                ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")],
                env=self.environment,
                stdout=out,
                stderr=out,
            )
        _until(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld")

    def stop_controller(self) -> None:
        """Stops slurmctld; jobs run on."""
        if self.controller:
            self.controller.terminate()
            self.controller.wait(20)
            self.controller = None

    def run(self, *command: str, check: bool = True) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=check, timeout=60)
        return done.stdout

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("w") as out:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=out, stderr=out))

    def _conf(self, munge: Path) -> str:
        return f"""
ClusterName=test
SlurmctldHost={self.host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge},cred_expire=5
CredType=cred/munge
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=2
OverTimeLimit=0
NodeName={self.host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000
PartitionName=debug Nodes={self.host} Default=YES MaxTime=INFINITE State=UP
"""


def _until(holds, what: str, seconds: float = 60) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)
