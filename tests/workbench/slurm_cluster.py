"""A real Slurm on this machine: two nodes that are fake, with four GPUs each that are null devices. As root, without
systemd, cgroups, a database or a network; Debian's packages slurmctld, slurmd, slurm-client and munge."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
WHY = f"Slurm cannot be started here: {', '.join(MISSING)} missing" if MISSING else ""
WHY = WHY or ("Slurm's daemons want root" if os.geteuid() else "")
NODES, GPUS, CPUS = ("n1", "n2"), 4, 8


def configuration(folder: Path, ports: list[int]) -> str:
    host = socket.gethostname().partition(".")[0]
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Gres=gpu:{GPUS}"
        for name, port in zip(NODES, ports[1:], strict=True)
    ]
    return "\n".join(
        [
            "ClusterName=tests",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={folder}/munge/socket,cred_expire=15",  # a requeued job waits so long, 120 s by default
            "CredType=cred/munge",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool/%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd.%n.pid",
            f"SlurmctldLogFile={folder}/slurmctld.log",
            f"SlurmdLogFile={folder}/slurmd.%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "MpiDefault=none",
            "SwitchType=switch/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0",
            "ReturnToService=2",
            "KillWait=30",
            "MinJobAge=600",
            "SlurmdParameters=config_overrides",  # the nodes have what is said, not what is there
            "GresTypes=gpu",
            *nodes,
            "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
            "",
        ]
    )


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def start(folder: Path) -> Path:
    """Start the cluster; returns the file that SLURM_CONF names. Raises RuntimeError where it does not come up."""
    for name in ("state", "munge", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    for above in (folder, *folder.parents[:-2]):  # munge, a user of its own, goes through these
        above.chmod(above.stat().st_mode | 0o055)
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    for path in (folder / "munge", folder / "munge" / "key"):
        shutil.chown(path, "munge", "munge")
    (folder / "munge").chmod(0o755)
    (folder / "munge" / "key").chmod(0o400)
    inside = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{flag}={folder}/munge/{name}" for flag, name in inside.items()]
    _call("runuser", "-u", "munge", "--", "munged", "--force", *munge)
    lines = []
    for number in range(GPUS):
        os.mknod(folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
    lines = [f"NodeName={node} Name=gpu File={folder}/gpu[0-{GPUS - 1}]" for node in NODES]
    (folder / "gres.conf").write_text("\n".join(lines) + "\n")
    conf = folder / "slurm.conf"
    conf.write_text(configuration(folder, free_ports(1 + len(NODES))))
    own = {**os.environ, "SLURM_CONF": str(conf)}
    _call("slurmctld", "-c", env=own)
    for node in NODES:
        _call("slurmd", "-N", node, "-c", env=own)
    idle = ["sinfo", "-h", "-t", "idle", "-o", "%D"]
    deadline = time.monotonic() + 60
    while subprocess.run(idle, env=own, stdout=subprocess.PIPE).stdout.strip() != b"2":
        if time.monotonic() > deadline:
            raise RuntimeError((folder / "slurmctld.log").read_text()[-2000:])
        time.sleep(0.2)
    return conf


def stop(folder: Path) -> None:
    """End all jobs, then the daemons: a job's last step would wait for them without end."""
    conf = folder / "slurm.conf"
    own, deadline = {**os.environ, "SLURM_CONF": str(conf)}, time.monotonic() + 60
    open_jobs = ["squeue", "-h", "-o", "%i", "-t", "PENDING,RUNNING,SUSPENDED,COMPLETING"]
    while jobs := subprocess.run(open_jobs, env=own, stdout=subprocess.PIPE, text=True).stdout.split():
        subprocess.run(["scancel", *jobs], env=own, stderr=subprocess.DEVNULL)
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    for file in (*folder.glob("*.pid"), folder / "munge" / "pid"):
        if file.exists():
            os.kill(int(file.read_text()), signal.SIGTERM)


def _call(*words: str, **how: object) -> None:
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=60, **how)
    if done.returncode:
        raise RuntimeError(f"{words[0]}: {done.stderr}")
