"""The words of the command line: what each command takes, and who answers it; torch and ray are loaded only then."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from graftstack import __version__
from graftstack.config.jobs import JOBS
from graftstack.errors import EXIT_DONE, EXIT_FAILED, BadInputError

_DESCRIPTION = """\
graftstack grafts a new head onto a pretrained backbone, on this machine or on a Ray cluster.

jobs (each explains its keys with --help):
  finetune [key=value ...]   fine-tune a pretrained backbone
  pretrain [key=value ...]   train a backbone from its initial weights
  sweep [key=value ...]      fine-tune over freeze depth, learning rate or any key; what is frozen runs once
  stack [key=value ...]      cross-validate base models, and learn to weigh what they predict
  meta [key=value ...]       learn from many small tasks how to tell new classes apart from a few images
  pipeline [key=value ...]   a sweep, and a stack of its best trials

around them:
  plan JOB [key=value ...]   check everything and print what would run
  submit JOB [key=value ...] --to ADDRESS|k8s   run it on a Ray cluster, or on Kubernetes
  jobs [list|status|logs|stop] --to ADDRESS|k8s   what was submitted there
  predict RUN DATA --out F   predict with a run's model
  evaluate RUN [DATA]        measure a run's model on labelled data
  runs [show|compare]        list, show and compare runs
  demo                       the whole story, offline, on bundled data
  doctor [--to ADDRESS|k8s]  what is wrong with this machine, or with a cluster, and the fix
"""

_ABOUT_DOCTOR = """\
Looks for what keeps jobs from running, or makes them slow, and prints the fix of each fault in one line.

  graftstack doctor                           this machine: packages, torch and its GPUs, disks, threads, limits, Ray,
                                              the token, where runs lie, and what a submission sends
  graftstack doctor --to http://HOST:8265     a Ray cluster: its answer and its token, versions there and here, and, by
                                              a small job there, each node: storage that all can write and see,
                                              disks, GPUs against torch, threads, bytecode
  graftstack doctor --to k8s [k8s.KEY=value …]  Kubernetes, for jobs with these words: who you are and may do, the
                                              namespace, KubeRay and its version, the queue, and what pods need there;
                                              it changes nothing

Each line is ok, warn (jobs run, but slower or otherwise than expected) or broken (some jobs can't run). The exit status
is 1 if anything is broken, 2 if the words of the command don't go together, and 0 otherwise.
"""


def _run_job(options: argparse.Namespace) -> int:
    if options.help:
        from graftstack.report.explain import job_help

        print(job_help(options.command))
        return EXIT_DONE
    from graftstack.report.jobs import check_job_for_leakage, run_job, run_spec

    if options.spec is not None:
        if options.overrides or options.check_leakage:
            words = [*options.overrides, *(["--check-leakage"] if options.check_leakage else [])]
            raise BadInputError(f"--spec {options.spec}: says all of a job; leave {' '.join(words)} out")
        return run_spec(options.command, options.spec, verbose=options.verbose)
    if options.check_leakage:
        is_clean = check_job_for_leakage(options.command, options.overrides, verbose=options.verbose)
        return EXIT_DONE if is_clean else EXIT_FAILED
    return run_job(options.command, options.overrides, verbose=options.verbose)


def _plan(options: argparse.Namespace) -> int:
    from graftstack.report.jobs import plan_job

    plan_job(options.job, options.overrides, as_json=options.json)
    return EXIT_DONE


def _submit(options: argparse.Namespace) -> int:
    if options.help:
        from graftstack.report.explain import pods_help

        print(f"{options.format_help()}\n{pods_help()}")
        return EXIT_DONE
    if options.check is not None:
        if options.job is not None:
            raise BadInputError(f"--check {options.check}: looks at a file; leave {options.job} out")
        from graftstack.report.kubernetes import check_manifests

        return check_manifests(options.check)
    if options.job is None:
        raise BadInputError(f"submit: which job? {', '.join(sorted(JOBS))}; see graftstack submit --help")
    if options.to == "k8s":
        if options.with_code:
            raise BadInputError("--with-code: pods run what their image holds; build one with it, and leave this out")
        from graftstack.report import kubernetes

        return kubernetes.submit_job(options.job, options.overrides, dry_run=options.dry_run, follows=options.follow)
    from graftstack.report import submitting

    return submitting.submit_job(
        options.job,
        options.overrides,
        to=options.to,
        with_code=options.with_code,
        dry_run=options.dry_run,
        follows=options.follow,
    )


def _jobs(options: argparse.Namespace) -> int:
    _check_job_words(options)
    if options.to == "k8s":
        from graftstack.report import kubernetes

        return kubernetes.run_action(
            options.action,
            options.ids,
            namespace=options.namespace,
            context=options.context,
            follows=options.follow,
        )
    from graftstack.report import submitting

    match options.action:
        case "list":
            return submitting.list_jobs(to=options.to, as_json=options.json)
        case "status":
            return submitting.show_job(options.ids[0], to=options.to, as_json=options.json)
        case "logs":
            return submitting.show_logs(options.ids[0], to=options.to, follows=options.follow)
        case _:
            return submitting.stop_job(options.ids[0], to=options.to)


def _check_job_words(options: argparse.Namespace) -> None:
    words = " ".join(("jobs", options.action, *options.ids))
    if len(options.ids) != (0 if options.action == "list" else 1):
        wanted = "no submission" if options.action == "list" else "one submission"
        raise BadInputError(f"{words}: takes {wanted}; see graftstack jobs --help")
    if options.follow and options.action != "logs":
        raise BadInputError(f"{words}: follows nothing; use graftstack jobs logs --follow")
    if options.json and (options.action in ("logs", "stop") or options.to == "k8s"):
        raise BadInputError(f"{words}: has no JSON here; leave --json out")
    if options.to != "k8s" and (options.namespace or options.context):
        raise BadInputError(f"{words}: a namespace and a context are Kubernetes'; add --to k8s, or leave them out")


def _predict(options: argparse.Namespace) -> int:
    from graftstack.report.predicting import predict_run

    predict_run(
        options.run_name,
        options.data,
        options.out,
        base=options.base,
        support=options.support,
        runs_dir=options.runs_dir,
    )
    return EXIT_DONE


def _evaluate(options: argparse.Namespace) -> int:
    from graftstack.report.predicting import evaluate_run

    evaluate_run(options.run_name, options.data, part=options.split, as_json=options.json, runs_dir=options.runs_dir)
    return EXIT_DONE


def _runs(options: argparse.Namespace) -> int:
    from graftstack.report.runs import show_runs

    show_runs(options.action, options.names, runs_dir=options.runs_dir, as_json=options.json)
    return EXIT_DONE


def _demo(options: argparse.Namespace) -> int:
    from graftstack.demo import run_demo

    run_demo(options.runs_dir)
    return EXIT_DONE


def _doctor(options: argparse.Namespace) -> int:
    from graftstack.doctor import Target, run_doctor

    target = Target(to=options.to, runs_dir=options.runs_dir, words=options.words)
    return EXIT_DONE if run_doctor(target, as_json=options.json) else EXIT_FAILED


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise BadInputError(f"{message}; see {self.prog} --help")


class _Command(_Parser):
    """Takes options before, between and after its other words."""

    _is_mixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._is_mixing or "-h" in args or "--help" in args:
            return super().parse_known_args(args, namespace)
        self._is_mixing = True
        return self.parse_known_intermixed_args(args, namespace)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all words; what it finds has `run`, which answers and returns an exit status."""
    parser = _Parser(
        prog="graftstack",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="graftstack COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"graftstack {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", parser_class=_Command, required=True, prog="graftstack"
    )
    for job in JOBS:
        command = _add(commands, job, _run_job, add_help=False)
        command.add_argument("overrides", nargs="*")
        command.add_argument("-h", "--help", action="store_true")
        command.add_argument("-v", "--verbose", action="store_true")
        command.add_argument("--check-leakage", action="store_true")
        command.add_argument("--spec", metavar="PATH")
    _add_submission(commands)
    _add_inspection(commands)
    demo = _add(commands, "demo", _demo, text="Pretrain on digits 0-4, fine-tune on 5-9, sweep and stack; offline.")
    demo.add_argument("--runs-dir", default="runs/demo", help="where the demo's runs go; made anew each time")
    _add_doctor(commands)
    return parser


def _add_doctor(commands: Any) -> None:
    doctor = _add(commands, "doctor", _doctor, text=_ABOUT_DOCTOR)
    doctor.formatter_class = argparse.RawDescriptionHelpFormatter
    doctor.add_argument(
        "words",
        nargs="*",
        metavar="k8s.KEY=value",
        help="--to k8s: those of the jobs that are to run; see submit --help",
    )
    doctor.add_argument(
        "--to",
        metavar="ADDRESS|k8s",
        help="where jobs go: k8s, or a Ray cluster by its dashboard, http://HOST:8265; default: this machine",
    )
    doctor.add_argument("--json", action="store_true", help="a list of {name, status, detail, fix}")
    doctor.add_argument(
        "--runs-dir",
        metavar="PLACE",
        help="the path or URI of the runs, which is tried: from here, or from each node of a cluster (default: runs)",
    )


def _add_submission(commands: Any) -> None:
    submit = _add(
        commands,
        "submit",
        _submit,
        text="Run a job on a cluster. Submitting the same again finds what was submitted; a job that failed or was "
        "stopped goes on where it was.",
        add_help=False,
    )
    submit.add_argument("job", nargs="?", choices=sorted(JOBS))
    submit.add_argument(
        "overrides", nargs="*", metavar="key=value", help="see graftstack JOB --help; --to k8s: also k8s.KEY=value"
    )
    submit.add_argument(
        "--with-code", action="store_true", help="send this graftstack along; git says what belongs to it"
    )
    # An option with a value of its own would take the word behind it for one.
    submit.add_argument(
        "--dry-run", dest="dry_run", action="store_const", const="client", help="print what would be sent, send nothing"
    )
    submit.add_argument(
        "--dry-run=server", dest="dry_run", action="store_const", const="server", help="ask the cluster, start nothing"
    )
    submit.add_argument("--check", metavar="FILE", help="only say what is wrong with the RayJobs of a file")
    submit.add_argument("-h", "--help", action="store_true", help="show this, and the keys of pods")
    jobs = _add(commands, "jobs", _jobs, text="List what was submitted to a cluster; show, follow or stop one of it.")
    jobs.add_argument("action", nargs="?", default="list", choices=("list", "status", "logs", "stop"))
    jobs.add_argument("ids", nargs="*", metavar="SUBMISSION")
    jobs.add_argument("--json", action="store_true", help="list, status: as JSON")
    jobs.add_argument("--namespace", metavar="NAME", help="--to k8s: where the jobs are (default: graftstack)")
    jobs.add_argument("--context", metavar="NAME", help="--to k8s: of the kubeconfig; default: its current one")
    for command, what in (submit, "write its log, and end as the job does"), (jobs, "logs: until the job is over"):
        command.add_argument("-f", "--follow", action="store_true", help=what)
        command.add_argument("-v", "--verbose", action="store_true", help="say where an error was met")
        command.add_argument(
            "--to",
            metavar="ADDRESS|k8s",
            help="k8s, or a Ray cluster by its dashboard, http://HOST:8265. Default: $RAY_API_SERVER_ADDRESS, "
            "$RAY_ADDRESS, else the one on this machine. Its token is in $RAY_AUTH_TOKEN, or in the file "
            "$RAY_AUTH_TOKEN_PATH",
        )
    submit.set_defaults(format_help=submit.format_help)


def _add_inspection(commands: Any) -> None:
    plan = _add(commands, "plan", _plan, text="Check a job and print what it would do; trains nothing.")
    plan.add_argument("job", choices=sorted(JOBS))
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--json", action="store_true")

    predict = _add(commands, "predict", _predict, text="Predict every row of DATA with the model of RUN.")
    predict.add_argument("run_name", metavar="RUN", help="a run's name, or the path or URI of its folder")
    predict.add_argument("data", metavar="DATA", help="a Parquet or CSV file, a folder of images, or digits")
    predict.add_argument("--out", required=True, help="the Parquet file to write")
    predict.add_argument("--base", metavar="NAME", help="let one base model of a stack predict alone")
    predict.add_argument(
        "--support",
        metavar="DATA",
        help="a meta run: labelled images, in any form of DATA, from which it learns the classes. With "
        "eval.batchnorm=transductive all rows are normalised together, and each answer depends on the others",
    )

    evaluate = _add(commands, "evaluate", _evaluate, text="Measure the model of RUN on labelled data.")
    evaluate.add_argument("run_name", metavar="RUN", help="a run's name, or the path or URI of its folder")
    evaluate.add_argument("data", metavar="DATA", nargs="?", help="default: the data that the run was trained with")
    evaluate.add_argument(
        "--split",
        choices=("train", "val", "test", "all"),
        help="default: val of the run's own data, all of other data; a meta run's own classes: those for testing",
    )
    evaluate.add_argument("--json", action="store_true")

    runs = _add(commands, "runs", _runs, text="List runs, show one, or compare several.")
    runs.add_argument("action", nargs="?", default="list", choices=("list", "show", "compare"))
    runs.add_argument("names", nargs="*", metavar="RUN")
    runs.add_argument("--json", action="store_true")
    for command in (predict, evaluate, runs):
        command.add_argument("--runs-dir", default="runs", help="where run folders lie (default: runs)")


def _add(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], *, text: str = "", add_help: bool = True
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, description=text, add_help=add_help)
    command.set_defaults(run=run)
    return command
