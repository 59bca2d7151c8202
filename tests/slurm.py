"""A Slurm of one node in a folder of its own, for tests: python slurm.py up FOLDER, and down FOLDER. It needs root, and Debian's slurm-wlm and munge."""
import os, secrets, shutil, socket, subprocess, sys, time
from pathlib import Path

PROGRAMS = "munged", "slurmctld", "slurmd", "sbatch"
CONF = """ClusterName=one
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
JobCompType=jobcomp/none
KillWait=10
MinJobAge=300
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldPort={ctl}
SlurmdPort={node}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10
"""

def missing() -> list[str]: return [p for p in PROGRAMS if not shutil.which(p) and not Path("/usr/sbin", p).exists()]

def ready() -> bool:
    "Whether the programs are here, installed now if that can be."
    if missing() and os.geteuid() == 0 and shutil.which("apt-get"):
        env = os.environ | dict(DEBIAN_FRONTEND="noninteractive")
        for words in (["update"], ["install", "-y", "slurm-wlm", "munge"]):
            try: subprocess.run(["apt-get", "-qq", *words], env=env, capture_output=True, timeout=300)
            except subprocess.TimeoutExpired: pass
    return not missing() and os.geteuid() == 0

def _free() -> int:
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]

def environment(folder: Path) -> dict[str, str]: return os.environ | dict(SLURM_CONF=str(folder/"slurm.conf"), PATH=f"{os.environ['PATH']}:/usr/sbin")

def up(folder: Path) -> dict[str, str]:    # the environment of whoever speaks with it
    "Start it, and wait until its node takes jobs."
    for name in ("state", "spool"): (folder/name).mkdir(parents=True, exist_ok=True)
    os.chmod(folder, 0o755)
    key = folder/"munge.key"; key.write_bytes(secrets.token_bytes(128)); key.chmod(0o400)
    memory = os.sysconf("SC_PAGE_SIZE")*os.sysconf("SC_PHYS_PAGES") >> 20
    (folder/"slurm.conf").write_text(CONF.format(folder=folder, host=socket.gethostname(), ctl=_free(), node=_free(), cpus=os.cpu_count(), memory=memory*9//10))
    env = environment(folder)
    munge = ["munged", "--force", f"--key-file={key}", *(f"--{what}={folder}/munge.{name}" for what, name in (("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed")))]
    for command in (munge, ["slurmctld"], ["slurmd"]): subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    for _ in range(100):
        got = subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True).stdout.split()
        if got and set(got) == {"idle"}: return env
        time.sleep(0.2)
    raise RuntimeError(f"Slurm did not come up; see {folder}/slurmctld.log")

def down(folder: Path) -> None:
    "End it, with what runs in it."
    env = environment(folder)
    subprocess.run(["scancel", "--signal=KILL", "-u", "root"], env=env, capture_output=True)
    subprocess.run(["scancel", "-u", "root"], env=env, capture_output=True)
    time.sleep(1)
    pids = []
    for name in ("slurmd", "slurmctld", "munge"):
        try: pids.append(int((folder/f"{name}.pid").read_text())); os.kill(pids[-1], 15)
        except (OSError, ValueError): pass
    until = time.monotonic() + 10
    while any(map(_alive, pids)) and time.monotonic() < until: time.sleep(0.1)
    for pid in filter(_alive, pids): os.kill(pid, 9)

def _alive(pid: int) -> bool:
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError: return False

if __name__ == "__main__": dict(up=up, down=down)[sys.argv[1]](Path(sys.argv[2]).resolve())
