"""A real Slurm on this machine: two virtual nodes on loopback, no systemd, no cgroups; for root alone.

`python tests/cluster/virtual_slurm.py DIR [--accounting]` runs one until it is interrupted, to try things by hand.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct")
PACKAGES = "apt-get install --no-install-recommends slurm-wlm munge"
_MARK = "# ssodbench tests"
_HOSTS = Path("/etc/hosts")
_LOCK = Path(tempfile.gettempdir()) / "ssodbench-virtual-slurm.lock"

# Short times, so that what takes a cluster minutes takes a test seconds: SIGKILL comes after 10 s, a node is given up
# after 15 s, and a job that was requeued may start as soon as its credential has expired, after 6 s.
_CONF = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=6
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=26817
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=10
MinJobAge={min_job_age}
OverTimeLimit=0
SchedulerParameters=sched_interval=3,bf_interval=3,batch_sched_delay=1,requeue_delay=1
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{accounting}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=27001 CPUs=8 RealMemory=4000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=27002 CPUs=8 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=cancelled Nodes=n1,n2 PriorityTier=1 PreemptMode=CANCEL GraceTime=60
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""
_DBD = """
AuthType=auth/munge
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort=26819
CommunicationParameters=NoInAddrAny
SlurmUser=root
StorageType=accounting_storage/mysql
StorageUser=slurm
StoragePass=x
StorageLoc=slurm_acct_db
LogFile={dir}/slurmdbd.log
PidFile={dir}/slurmdbd.pid
"""


def missing(accounting: bool = False) -> str | None:
    """Why there can be no Slurm here; None where there can."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    lacking = [name for name in PROGRAMS + (ACCOUNTING if accounting else ()) if not shutil.which(name, path=search)]
    if lacking:
        packages = f"{PACKAGES} slurmdbd mariadb-server" if accounting else PACKAGES
        return f"Slurm is not installed ({', '.join(lacking)} not found): {packages}"
    return None if os.geteuid() == 0 else "a Slurm of one's own needs root"


class VirtualSlurm:
    """The daemons of a Slurm in a folder.

    Args:
        folder: of its state and logs; made if it is not there.
        accounting: whether it has a database of jobs that have ended (slurmdbd); otherwise they are known for
            `min_job_age` seconds.
        min_job_age: seconds for which the controller knows a job that has ended.
    """

    def __init__(self, folder: Path, accounting: bool = False, min_job_age: int = 30) -> None:
        self.folder, self.accounting, self.min_job_age = folder, accounting, min_job_age
        self.conf = folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._lock: TextIO | None = None
        self._database: Path | None = None

    def start(self) -> None:
        """Starts the daemons and waits until both nodes are idle.

        Raises:
            RuntimeError: another one runs on this machine, or a daemon has ended at once.
            TimeoutError: they do not get ready.
        """
        self._lock = _take_lock()
        os.environ["SLURM_CONF"] = str(self.conf)
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        self._write()
        self._authenticate()
        if self.accounting:
            self._start_database()
        self._spawn("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Waits until both nodes are idle."""
        self._until(lambda: ask("sinfo", "-h", "-N", "-p", "main", "-t", "idle").count("\n") == 2, "idle nodes")

    def start_node(self, node: str) -> None:
        """Starts the daemon of a node."""
        self._spawn(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))

    def lose_node(self, node: str) -> None:
        """Ends a node as a loss of power does: its daemon and all processes of its jobs, at once."""
        self._require_daemons()
        daemon = self.daemons.pop(node)
        daemon.kill()
        daemon.wait()
        for process in _processes_of_node(node):
            with suppress(psutil.Error):
                process.kill()

    def stop(self) -> None:
        """Ends the jobs and the daemons; nothing where it was never started."""
        if self._lock is None:
            return
        if "slurmctld" in self.daemons:
            subprocess.run(["scancel", "-u", "root"], check=False, timeout=20)
            with suppress(TimeoutError, RuntimeError):
                self._until(lambda: not ask("squeue", "-h"), "an empty queue", 20)
        for name, daemon in reversed(self.daemons.items()):
            daemon.send_signal(signal.SIGKILL if name == "munged" else signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(15)
            daemon.kill()
        self.daemons.clear()
        if self._database is not None:
            shutil.rmtree(self._database, ignore_errors=True)
        kept = [line for line in _HOSTS.read_text().splitlines() if _MARK not in line]
        _HOSTS.write_text("\n".join(kept) + "\n")
        self._lock.close()
        self._lock = None

    def _write(self) -> None:
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        host = socket.gethostname().split(".")[0]
        storage = "AccountingStorageType=accounting_storage/"
        database = f"{storage}slurmdbd\nAccountingStorageHost=127.0.0.1\nAccountingStoragePort=26819"
        text = _CONF.format(
            host=host,
            dir=self.folder,
            min_job_age=self.min_job_age,
            accounting=database if self.accounting else f"{storage}none",
        )
        self.conf.write_text(text)
        (self.folder / "slurmdbd.conf").write_text(_DBD.format(host=host, dir=self.folder))
        (self.folder / "slurmdbd.conf").chmod(0o600)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for gpu in ("gpu0", "gpu1"):  # stand-ins: without a driver CUDA is not there, which is a case of its own
            (self.folder / gpu).touch()
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-1]\n")
        if _MARK not in _HOSTS.read_text():  # the processes of a job find each other by the nodes' names
            with _HOSTS.open("a") as file:
                file.write(f"127.0.0.1 n1 n2 {_MARK}\n")

    def _authenticate(self) -> None:
        if _works("munge", "-n"):
            return  # somebody's munged runs
        for folder in ("/run/munge", "/var/lib/munge", "/var/log/munge"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            shutil.chown(folder, "munge", "munge")
        Path("/run/munge").chmod(0o755)
        self._spawn("munged", "runuser", "-u", "munge", "--", "munged", "-F", "-f")
        self._until(lambda: _works("munge", "-n"), "munge")

    def _start_database(self) -> None:
        # Not in `folder`: the user of the database must reach it, and pytest closes its folders when a session starts.
        data = self._database = Path(tempfile.mkdtemp(prefix="ssodbench-slurm-"))
        shutil.chown(data, "mysql")
        sock = data / "sock"
        install = ["mariadb-install-db", "--user=mysql", f"--datadir={data}", "--skip-test-db"]
        subprocess.run(install, check=True, capture_output=True)
        Path("/run/mysqld").mkdir(exist_ok=True)
        link = Path("/run/mysqld/mysqld.sock")
        link.unlink(missing_ok=True)
        link.symlink_to(sock)
        options = ["--no-defaults", "--user=mysql", f"--datadir={data}", f"--socket={sock}", "--skip-networking"]
        self._spawn("mariadbd", "mariadbd", *options)
        setup = (
            "create database if not exists slurm_acct_db; create or replace user slurm@localhost identified by 'x'; "
            "grant all on slurm_acct_db.* to slurm@localhost"
        )
        self._until(lambda: _works("mariadb", "--no-defaults", "-S", str(sock), "-e", setup), "the database")
        self._spawn("slurmdbd", "slurmdbd", "-D")
        self._until(lambda: _listens(26819), "slurmdbd")

    def _spawn(self, name: str, *command: str) -> None:
        """Starts a daemon, which the system ends should this process be killed."""
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _until(self, holds: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        """Waits until something holds.

        Raises:
            RuntimeError: a daemon has ended, so that whoever answers is not of this cluster.
            TimeoutError: it does not.
        """
        end = time.monotonic() + seconds
        while not holds():
            self._require_daemons()
            if time.monotonic() > end:
                raise TimeoutError(f"no {what} after {seconds:.0f} s")
            time.sleep(0.3)
        self._require_daemons()

    def _require_daemons(self) -> None:
        for name, daemon in self.daemons.items():
            if daemon.poll() is not None:
                said = (self.folder / f"{name}.out").read_text(errors="replace").splitlines()
                raise RuntimeError(
                    f"{name} has ended with {daemon.returncode}: {said[-1] if said else 'without a word'}"
                )


def ask(*command: str) -> str:
    """What a program of Slurm prints; nothing while it has no answer."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout if done.returncode == 0 else ""


def _works(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _take_lock() -> TextIO:
    """The right to be the one Slurm of this machine: its ports and the names of its nodes are always the same.

    Raises:
        RuntimeError: another process has it.
    """
    file = _LOCK.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise RuntimeError(f"{holder} runs a Slurm of the tests on this machine: wait until it has ended") from None
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    return file


def _processes_of_node(node: str) -> list[psutil.Process]:
    """Processes of jobs on a node, told by a variable of theirs; first the daemons that would report their end."""
    jobs = [process for process in psutil.process_iter() if _variable(process, "SLURMD_NODENAME") == node]
    parents = [process.parent() for process in jobs]
    return [parent for parent in parents if parent and parent.name() == "slurmstepd"] + jobs


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except psutil.Error:
        return None


def main() -> None:
    """Runs a Slurm until it is interrupted."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--accounting", action="store_true")
    given = parser.parse_args()
    if why := missing(given.accounting):
        sys.exit(why)
    slurm = VirtualSlurm(given.folder.absolute(), given.accounting)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        slurm.start()
        sys.stdout.write(f"export SLURM_CONF={slurm.conf}\n")
        sys.stdout.flush()
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        slurm.stop()


if __name__ == "__main__":
    main()
