"""What is in jobs/ for schedulers is read by their own tools, and calls the command line alone."""

import ast
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import types
from datetime import timedelta
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from crontab import CronTab

from softshard.cli import main
from softshard.config.job_file import load_job

JOBS = Path(__file__).parents[2] / "jobs"
SERVICE, TIMER = JOBS / "systemd/softshard@.service", JOBS / "systemd/softshard@.timer"
CRON, SLURM = JOBS / "cron/softshard.cron", JOBS / "slurm/softshard.sbatch"
KUBERNETES, AIRFLOW = JOBS / "kubernetes/softshard.yaml", JOBS / "airflow/softshard_dag.py"


def unit(path):
    """Settings of a unit file by section; of a setting that is given twice, all values."""
    sections, section = {}, {}
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            name, value = line.split("=", 1)
            section.setdefault(name, []).append(value)
    return sections


def is_a_command(words):
    """Whether the arguments are ones that softshard takes; the job file need not be there."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    return ended.value.code == 0


def program(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_systemd_service_is_retried_on_75_alone_and_stopped_gently():
    service = unit(SERVICE)["Service"]
    assert service["Restart"] == ["no"]
    assert service["RestartForceExitStatus"] == ["75"]
    assert service["KillMode"] == ["mixed"]
    assert service["Type"] == ["exec"], "systemd refuses RestartForceExitStatus for oneshot"
    (command,) = service["ExecStart"]
    words = command.split()
    assert words[0].endswith("/softshard")
    assert is_a_command(words[1:])


def test_systemd_timer_starts_every_night_and_after_a_night_that_was_missed():
    timer = unit(TIMER)["Timer"]
    assert timer["OnCalendar"] == ["*-*-* 01:00:00"]
    assert timer["Persistent"] == ["true"]
    assert unit(TIMER)["Install"]["WantedBy"] == ["timers.target"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path):
    for path in (SERVICE, TIMER):
        text = path.read_text().replace("/opt/softshard/bin/softshard", "/bin/true")
        (tmp_path / path.name).write_text(text)
    command = ["systemd-analyze", "verify", str(tmp_path / TIMER.name), str(tmp_path / SERVICE.name)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_cron_runs_one_job_every_night_as_its_user():
    (job,) = CronTab(tabfile=str(CRON), user=False)
    assert job.is_valid()
    assert (job.user, str(job.slices)) == ("softshard", "0 1 * * *")
    assert "%" not in job.command, "cron takes a percent sign for the end of the line"
    (words,) = re.findall(r"/opt/softshard/bin/softshard (run .*?) >", job.command)
    assert is_a_command(words.split())


@pytest.mark.parametrize(("codes", "calls"), [([0], 1), ([3], 1), ([75, 75, 2], 3), ([75] * 9, 4)])
def test_cron_tries_again_on_75_alone(tmp_path, codes, calls):
    (job,) = CronTab(tabfile=str(CRON), user=False)
    program(tmp_path, "softshard", 'echo >> calls; mapfile -t codes < codes; exit "${codes[$(wc -l < calls) - 1]}"')
    program(tmp_path, "sleep", "")
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    command = job.command.replace("/opt/softshard/bin", str(tmp_path)).replace("/srv/softshard", str(tmp_path))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], check=False, env=environment, timeout=60)
    assert len((tmp_path / "calls").read_text().splitlines()) == calls


def test_slurm_script_has_no_fault_that_shellcheck_finds():
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0
    shellcheck = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, SLURM], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


def test_slurm_directives_are_options_of_sbatch_before_the_first_command():
    lines = SLURM.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert all(lines.index(line) < first for line in directives)
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in directives)
    assert options["dependency"] == "singleton"
    assert options["signal"] == "B:TERM@300"
    assert "requeue" in options


@pytest.fixture
def slurm(tmp_path):
    """Runs the script on a machine where every program of Slurm and Dask is one that says that it was called."""
    log = tmp_path / "calls"
    for name in ("dask", "srun"):
        program(tmp_path, name, f'echo "{name} $*" >> {log}; exec sleep 60')
    program(tmp_path, "scontrol", f'echo "scontrol $*" >> {log}')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
    environment["SCHEDULER_FILE"] = str(tmp_path / "scheduler.json")

    def start(client, **changes):
        program(tmp_path, "softshard", client)
        return subprocess.Popen(["bash", SLURM, "letters.yaml"], env={**environment, **changes}, cwd=tmp_path)

    start.log = log
    return start


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(0, 0, False), (3, 0, False), (2, 0, False), (75, 0, True), (75, 5, False)]
)
def test_slurm_job_goes_back_into_the_queue_on_75_alone_and_not_for_ever(slurm, code, restarts, requeued):
    process = slurm(f"sleep 0.3; exit {code}", SLURM_RESTART_COUNT=str(restarts))
    assert process.wait(timeout=30) == code
    calls = slurm.log.read_text()
    assert ("scontrol requeue 7" in calls) == requeued
    assert "dask scheduler --scheduler-file" in calls
    assert "--resources teacher=1" in calls


def test_slurm_job_lets_the_client_finish_when_its_time_is_up(slurm, tmp_path):
    process = slurm(f"trap 'sleep 0.5; touch {tmp_path}/drained; exit 75' TERM; touch {tmp_path}/up; sleep 60 & wait")
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "drained").exists()
    assert "scontrol requeue 7" in slurm.log.read_text()


def kubernetes(kind):
    return [one for one in yaml.safe_load_all(KUBERNETES.read_text()) if one["kind"] == kind]


@pytest.mark.parametrize("version", ["1.31", "1.33"])
def test_kubernetes_objects_are_valid(version):
    for one in yaml.safe_load_all(KUBERNETES.read_text()):
        kubernetes_validate.validate(one, version, strict=True)


def test_kubernetes_tries_again_on_75_and_never_runs_two_at_once():
    (cron,) = kubernetes("CronJob")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    job = cron["spec"]["jobTemplate"]["spec"]
    (client,) = job["template"]["spec"]["containers"]
    failing, ignoring = job["podFailurePolicy"]["rules"]
    assert failing["action"] == "FailJob"
    assert failing["onExitCodes"] == {"containerName": client["name"], "operator": "In", "values": [1, 2, 3]}
    assert ignoring["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["template"]["spec"]["restartPolicy"] == "Never", "a pod failure policy needs it"
    assert client["command"][0] == "softshard"
    assert is_a_command(client["command"][1:])


def test_kubernetes_job_file_is_a_job_and_its_scheduler_the_service(tmp_path):
    (config,) = kubernetes("ConfigMap")
    (service,) = kubernetes("Service")
    (tmp_path / "job.yaml").write_text(config["data"]["letters.yaml"])
    job = load_job(tmp_path / "job.yaml", check_paths=False)
    (port,) = service["spec"]["ports"]
    address = f"tcp://{service['metadata']['name']}:{port['port']}"
    assert job.cluster.scheduler == address
    scheduler, workers = kubernetes("Deployment")
    assert scheduler["spec"]["template"]["metadata"]["labels"] == service["spec"]["selector"]
    assert address in workers["spec"]["template"]["spec"]["containers"][0]["command"]


def test_kubernetes_pods_are_of_one_image_and_reached_by_each_other_alone():
    (cron,) = kubernetes("CronJob")
    templates = [one["spec"]["template"] for one in kubernetes("Deployment")]
    templates.append(cron["spec"]["jobTemplate"]["spec"]["template"])
    assert len({one["spec"]["containers"][0]["image"] for one in templates}) == 1
    (policy,) = kubernetes("NetworkPolicy")
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    assert all(selected <= one["metadata"]["labels"].items() for one in templates)
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": policy["spec"]["podSelector"]}]}]


class AirflowException(Exception):
    pass


class AirflowFailException(Exception):
    pass


class Hook:
    """Runs a command as Airflow's hook does, and says how it ended."""

    def run_command(self, command, env):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        return types.SimpleNamespace(exit_code=done.returncode, output=done.stdout.strip())

    def send_sigterm(self):
        raise NotImplementedError


class Operator:
    def __init__(self, *, task_id):
        self.task_id, self.after = task_id, None

    def __rshift__(self, other):
        other.after = self.task_id


class Dag(dict):
    def __init__(self, **values):
        super().__init__(values)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


@pytest.fixture
def dag(monkeypatch):
    """The DAG's module, run with as little of Airflow as it uses."""
    modules = {
        "airflow": {},
        "airflow.sdk": {"DAG": Dag, "BaseOperator": Operator},
        "airflow.sdk.exceptions": {
            "AirflowException": AirflowException,
            "AirflowFailException": AirflowFailException,
        },
        "airflow.providers": {},
        "airflow.providers.standard": {},
        "airflow.providers.standard.hooks": {},
        "airflow.providers.standard.hooks.subprocess": {"SubprocessHook": Hook},
    }
    for name, values in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    scope = {"__name__": "softshard_dag"}
    exec(compile(AIRFLOW.read_text(), str(AIRFLOW), "exec"), scope)
    return scope


def test_airflow_runs_the_stages_one_after_the_other_one_night_at_a_time(dag):
    from softshard.stages import STAGES

    assert dag["STAGES"] == STAGES
    assert dag["task"].task_id == STAGES[-1]
    assert dag["task"].after == STAGES[-2]
    values = dag["dag"]
    assert (values["max_active_runs"], values["catchup"]) == (1, False)
    assert values["default_args"] == {"retries": 4, "retry_delay": timedelta(minutes=10)}
    assert all(is_a_command([stage, dag["JOB"], "--json"]) for stage in STAGES)


@pytest.mark.parametrize(
    ("code", "raised"),
    [
        (0, None),
        (75, AirflowException),
        (1, AirflowFailException),
        (2, AirflowFailException),
        (3, AirflowFailException),
    ],
)
def test_airflow_retries_on_75_alone(dag, tmp_path, monkeypatch, code, raised):
    program(tmp_path, "softshard", f'echo "$@" > {tmp_path}/call; exit {code}')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    task = dag["SoftshardOperator"](task_id="targets", job="letters.yaml", stage="targets")
    if raised is None:
        task.execute({})
    else:
        with pytest.raises(raised, match=f"softshard targets ended with {code}"):
            task.execute({})
    assert (tmp_path / "call").read_text() == "targets letters.yaml --json\n"


def test_airflow_starts_no_program_but_softshard():
    calls = [node for node in ast.walk(ast.parse(AIRFLOW.read_text())) if isinstance(node, ast.Call)]
    started = [ast.unparse(call) for call in calls if ast.unparse(call.func).endswith("run_command")]
    assert len(started) == 1
    assert "['softshard', self.stage, self.job, '--json']" in started[0]
