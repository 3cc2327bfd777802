"""run.sh as a Slurm job on two nodes: warned, requeued, preempted, cancelled, or with a lost node, it ends the same.

The cluster is real. It runs on this machine while the tests do: each node has its own network, host name and processes
(Linux namespaces). It needs root and Debian's slurmctld, slurmd, slurm-client and iproute2; without them the tests are
skipped. `pytest -s tests/test_slurm.py` prints what happened when.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, ROOT, flags, metrics_of, tiny

import saving

TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "sinfo", "scontrol", "scancel", "ip", "nsenter", "unshare", "setpriv")
NODES = {"hostA": "10.77.0.1", "hostB": "10.77.0.2"}
# what a machine has for itself, beside its network
OWN = ("--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
FREEZER = Path("/sys/fs/cgroup/freezer")  # control groups of version 1; those of version 2 need systemd
BOOT = f"""
hostname "$0"
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/empty" /etc/resolv.conf
[ ! -d "$2" ] || mount --bind "$2" {FREEZER}
shift 2
"$@" & wait
"""
STEPS = 240  # about 5 seconds
SETTINGS = dict(num_training_steps=STEPS, warmup_steps=50, dropout=0.2, save_every=10, log_every=5)

# A requeued job starts again when its credentials have ended: after cred_expire, 120 seconds by default, and 5 here.
SLURM_CONF = """
ClusterName=small
SlurmctldHost=hostA({hostA})
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType={tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmdParameters=config_overrides
NodeName=hostA NodeAddr={hostA} CPUs=2 RealMemory=1000
NodeName=hostB NodeAddr={hostB} CPUs=2 RealMemory=1000
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def wait_until(condition, report):
    """The first true value of `condition()`, called ten times a second. After PATIENCE, fails with `report()`."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    pytest.fail(f"waited {PATIENCE} seconds in vain: {report()}")


class Cluster:
    """Two nodes, and a controller in hostA's network. Each is one process, and all that it started ends with it."""

    def __init__(self, folder: Path):
        self.folder, self.networks, self.machines = folder, {}, {}
        self.groups = FREEZER / f"test_slurm_{os.getpid()}"  # of all processes of jobs
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.environment |= dict(SLURM_CONF=str(folder / "slurm.conf"), PYTHON=sys.executable, THREADS="1")

    def start(self) -> None:
        (self.folder / "state").mkdir()
        (self.folder / "empty").touch()
        hosts = {"localhost": "127.0.0.1", **NODES}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={FREEZER.parent}\n")
        tracking = "proctrack/linuxproc"
        with contextlib.suppress(OSError):  # if it can be, as on most clusters: the batch script's end then ends srun
            self.groups.mkdir()
            tracking = "proctrack/cgroup"
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(folder=self.folder, tracking=tracking, **NODES))
        for name in NODES:
            self.networks[name] = self.spawn("unshare", "--net", "sleep", "infinity")
        ours = os.readlink("/proc/self/ns/net")
        pids = [process.pid for process in self.networks.values()]
        wait_until(lambda: all(os.readlink(f"/proc/{pid}/ns/net") != ours for pid in pids), lambda: "no networks")
        wire = "ip link add wire netns {} type veth peer name wire netns {}".format(*pids)
        subprocess.run(wire.split(), check=True)
        for name, address in NODES.items():
            self.on(name, "ip", "address", "add", f"{address}/24", "dev", "wire")
            self.on(name, "ip", "link", "set", "lo", "up")
            self.on(name, "ip", "link", "set", "wire", "up")
        self.boot("controller", "hostA", "slurmctld", "-D", "-c")
        for name in NODES:
            self.boot(name, name, "slurmd", "-D", "-N", name)
        self.wait_for_nodes()

    def spawn(self, *command, **files) -> subprocess.Popen:
        """Starts a process that ends with this one, however that ends."""
        return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], env=self.environment,
                                stdin=subprocess.DEVNULL, **files)

    def boot(self, machine: str, name: str, *daemon) -> None:
        """Starts a machine, which is called `name` and uses the network of that name, with one daemon on it."""
        network = f"--net=/proc/{self.networks[name].pid}/ns/net"
        with open(self.folder / f"{machine}.out", "a") as out:
            words = ["nsenter", network, "unshare", *OWN, "sh", "-c", BOOT, name, self.folder, self.groups, *daemon]
            self.machines[machine] = self.spawn(*words, stdout=out, stderr=out)

    def on(self, name: str, *command, cwd=None) -> str:
        """Runs a command in a node's network; what it printed."""
        words = ["nsenter", f"--net=/proc/{self.networks[name].pid}/ns/net", *map(str, command)]
        result = subprocess.run(words, env=self.environment, cwd=cwd, capture_output=True, text=True,
                                timeout=PATIENCE)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def slurm(self, *command, cwd=None) -> str:
        return self.on("hostA", *command, cwd=cwd)

    def both_idle(self) -> bool:
        try:
            return self.slurm("sinfo", "--noheader", "--partition=usual", "--states=idle", "--format=%D") == "2"
        except AssertionError:  # the controller does not answer yet
            return False

    def wait_for_nodes(self) -> None:
        wait_until(self.both_idle, self.logs)

    def logs(self) -> str:
        return "\n".join(f"{path.name}: ... {path.read_text()[-1500:]}" for path in self.folder.glob("*.out"))

    def kill(self, machine: str) -> None:
        process = self.machines.pop(machine)
        process.kill()
        process.wait()

    def stop(self) -> None:
        for machine in [*self.machines]:
            self.kill(machine)
        for process in self.networks.values():
            process.kill()
            process.wait()
        wait_until(lambda: not any(tasks.read_text() for tasks in self.groups.rglob("cgroup.procs")),
                   lambda: "processes are left")
        for group, _, _ in os.walk(self.groups, topdown=False):
            os.rmdir(group)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        pytest.skip(f"not installed here: {', '.join(missing)}")
    if os.geteuid():
        pytest.skip("a Slurm cluster of one's own needs root")
    attempt = subprocess.run(["unshare", "--net", *OWN, "ip", "link", "add", "wire", "type", "veth"],
                             capture_output=True, text=True)
    if attempt.returncode:
        pytest.skip(f"no namespaces with networks here: {attempt.stderr.strip()}")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Job:
    """A training run in the queue, submitted from a folder of its own, without a name."""

    def __init__(self, cluster: Cluster, folder: Path, script: Path = ROOT / "run.sh", **changes):
        self.cluster, self.folder, self.began = cluster, folder, time.monotonic()
        self.noted = self.began
        # the run's name and ckpt_dir are the defaults, which `flags` leaves out
        config = tiny(folder, **{**SETTINGS, "run_name": "cifar10", "ckpt_dir": "ckpts", **changes})
        self.number = cluster.slurm("sbatch", "--parsable", "--nodes=2", "--cpus-per-task=2", script, "digits",
                                    *flags(config), cwd=folder)
        self.run, self.log = folder / "ckpts" / f"digits_{self.number}", folder / f"slurm-{self.number}.log"

    def note(self, what: str) -> None:
        """Prints, for `pytest -s`, the time since the job was submitted and since the last line, and what was seen."""
        now = time.monotonic()
        print(f"\n{now - self.began:5.1f} s (+{now - self.noted:4.1f})  job {self.number} {what}", end="", flush=True)
        self.noted = now

    def shown(self) -> dict[str, str]:
        """What Slurm knows of the job."""
        text = self.cluster.slurm("scontrol", "--oneliner", "show", "job", self.number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def report(self) -> str:
        return f"{self.shown()}\n{self.text()}\n{self.cluster.logs()}"

    def wait_for_checkpoint(self) -> None:
        wait_until((self.run / saving.LAST).exists, self.report)
        self.note("has its first checkpoint")

    def wait_for_text(self, words: str) -> None:
        wait_until(lambda: words in self.text(), self.report)
        self.note(f"prints: {words}")

    def wait_for_state(self, wanted: str) -> None:
        """Fails as soon as the job has come to another end."""
        ends = {wanted, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
        state = wait_until(lambda: {self.shown()["JobState"]} & ends, self.report).pop()
        self.note(f"is {state}")
        assert state == wanted, self.report()


@pytest.fixture(scope="module")
def straight(cluster, tmp_path_factory):
    """A run that nothing disturbs; its script lies in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "the project").symlink_to(ROOT)
    job = Job(cluster, folder, folder / "the project" / "run.sh")
    job.wait_for_checkpoint()
    job.wait_for_state("COMPLETED")
    return job


@pytest.fixture
def job(cluster, straight, tmp_path):
    """A run of the same settings that has come to its first checkpoint."""
    job = Job(cluster, tmp_path)
    try:
        job.wait_for_checkpoint()
        yield job
    finally:
        cluster.slurm("scancel", "--partition=usual")
        cluster.wait_for_nodes()


def content(job: Job):
    """The last checkpoint of a run, and its lines of metrics, without the speed."""
    return saving.load(str(job.run / saving.LAST)), metrics_of(job.run)


def check_second_part(job: Job, straight: Job) -> None:
    """The job resumes in a second part where the first ended, and ends with the weights and metrics of `straight`."""
    job.wait_for_text("resuming ")
    job.wait_for_state("COMPLETED")
    log = job.text()
    assert job.shown()["Restarts"] == "1" and log.count(", restart 0\n") == log.count(", restart 1\n") == 1, log
    (step,) = re.findall(r"resuming \S+ from step (\d+)\n", log)
    assert 10 <= int(step) < STEPS and "Traceback" not in log, log
    (expected, expected_lines), (state, lines) = content(straight), content(job)
    assert state["step"] == STEPS and [line["step"] for line in lines] == list(range(5, STEPS + 1, 5))
    assert lines == expected_lines
    for weights, right in ((state["net"], expected["net"]), (state["ema"], expected["ema"])):
        assert weights.keys() == right.keys() and all(torch.equal(weights[name], right[name]) for name in right)


def test_two_nodes(straight):
    log = straight.text()
    assert f"job {straight.number} on hostA,hostB, restart 0\n" in log, log
    assert f"digits_{straight.number} on 2 x cpu\n" in log, log
    assert f"step {STEPS}/{STEPS}" in log and "error:" not in log and "Traceback" not in log, log
    assert sorted(os.listdir(straight.folder)) == ["ckpts", straight.log.name, "the project"]
    assert os.listdir(straight.folder / "ckpts") == [straight.run.name]


def test_warned_of_the_end_of_its_time(cluster, straight, job):
    """As by --signal=B:USR1, only the batch script is warned. The run stops with a checkpoint, and is requeued."""
    cluster.slurm("scancel", "--batch", "--signal=USR1", job.number)
    job.note("is warned")
    job.wait_for_text("stopped by SIGUSR1 at step")
    job.wait_for_text("is put into the queue again")
    job.wait_for_state("PENDING")
    check_second_part(job, straight)


def test_requeued(cluster, straight, job):
    cluster.slurm("scontrol", "requeue", job.number)
    job.note("is requeued")
    job.wait_for_text("stopped by SIGTERM at step")
    job.wait_for_state("PENDING")
    check_second_part(job, straight)


def test_preempted(cluster, straight, job):
    """A job of higher priority takes both nodes."""
    urgent = cluster.slurm("sbatch", "--parsable", "--nodes=2", "--exclusive", "--partition=urgent", "--wrap=hostname",
                           cwd=job.folder)
    job.note(f"is in the way of job {urgent}")
    job.wait_for_text("stopped by SIGTERM at step")
    job.wait_for_state("PENDING")
    check_second_part(job, straight)
    assert (job.folder / f"slurm-{urgent}.out").read_text() == "hostA\n"


def test_cancelled(cluster, job):
    """A checkpoint, and no second part. At first it cannot be written: the ranks get the time to try again."""
    last = job.run / saving.LAST
    last.unlink()
    last.mkdir()
    failures = job.text().count("Is a directory")
    cluster.slurm("scancel", job.number)
    job.note("is cancelled")
    wait_until(lambda: job.text().count("Is a directory") > failures + 1, job.report)  # one may be from before the end
    last.rmdir()
    job.wait_for_text("stopped by SIGTERM at step")
    job.wait_for_state("CANCELLED")
    cluster.wait_for_nodes()
    assert job.shown()["JobState"] == "CANCELLED" and job.shown()["Restarts"] == "0"
    state, lines = content(job)
    assert 10 <= state["step"] < STEPS and f"at step {state['step']}, with a checkpoint" in job.text(), job.text()
    assert [line["step"] for line in lines] == list(range(5, state["step"] + 1, 5))


def test_a_node_dies(cluster, straight, job):
    """It is silent, as after a loss of power. Steps after the last checkpoint are lost; the job waits for two nodes."""
    cluster.on("hostB", "ip", "link", "set", "wire", "down")
    cluster.kill("hostB")
    cluster.slurm("scontrol", "update", "NodeName=hostB", "State=DOWN", "Reason=test")
    job.note("has lost hostB")
    job.wait_for_state("PENDING")
    cluster.on("hostB", "ip", "link", "set", "wire", "up")
    cluster.boot("hostB", "hostB", "slurmd", "-D", "-N", "hostB")
    job.note("may have hostB again")
    check_second_part(job, straight)


def test_time_limit(request, cluster, tmp_path):
    """Slurm itself warns the job, somewhat before the 180 seconds that run.sh asks for: it looks every 30 seconds."""
    if not request.config.getoption("--slow"):
        pytest.skip("waits for a minute: give --slow")
    job = Job(cluster, tmp_path, num_training_steps=100_000)
    job.wait_for_checkpoint()
    cluster.slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=3")
    job.note("has 3 minutes in all")
    job.wait_for_text("stopped by SIGUSR1 at step")
    job.wait_for_text(", restart 1")
    job.wait_for_text("resuming ")
    cluster.slurm("scancel", job.number)
    job.wait_for_state("CANCELLED")
