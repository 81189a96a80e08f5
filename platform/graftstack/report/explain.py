"""The help of a job: its keys, what they mean and what they are unless given."""

import textwrap
from itertools import groupby

from graftstack.config.docs import KeyDoc, key_docs
from graftstack.config.jobs import JOBS
from graftstack.config.k8s import PREFIX, K8sConfig
from graftstack.config.paths import conf_dir

_WIDTH = 34
_LINE = 120

_EXAMPLES = {
    "finetune": (
        "graftstack finetune data=image_folder data.path=flowers backbone=resnet18 backbone.weights=DEFAULT",
        "graftstack finetune data=parquet data.path=cifar.parquet data.image=image backbone=cifar_resnet20 "
        "backbone.weights=resnet20.th freeze_depth=2 recipe=lp_ft",
        "graftstack finetune name=flowers resume=true",
    ),
    "pretrain": ("graftstack pretrain data=digits backbone=conv4 epochs=20 name=digits-base",),
    "sweep": (
        "graftstack sweep backbone=conv4 backbone.weights=run:digits-base space.freeze_depth=[0,2,all] "
        "space.lr=[1e-4,1e-3,1e-2]",
        "graftstack sweep data=image_folder data.path=flowers backbone=resnet18 backbone.weights=DEFAULT "
        "space.freeze_depth=[4,all] 'space.lr=loguniform(1e-5,1e-2)' search=random num_samples=30 scheduler=asha",
        "graftstack sweep name=flowers-sweep resume=true",
    ),
    "stack": (
        "graftstack stack data=parquet data.path=adult.parquet data.label=income data.split=split "
        "base_models=[LogisticRegression,RandomForestClassifier,LGBMClassifier]",
        "graftstack stack from_sweep=flowers-sweep top=3 'base_models=[{probe:{backbone:resnet18,weights:DEFAULT}}]'",
        "graftstack stack data=csv data.path=prices.csv data.label=price task=regression folds.kind=kfold "
        "'base_models=[Ridge,{HistGradientBoostingRegressor:{max_iter:300}}]' meta_model=nonnegative",
        "graftstack stack --check-leakage data=parquet data.path=adult.parquet data.label=income "
        "base_models=[HistGradientBoostingClassifier]",
        "graftstack stack name=adult-stack resume=true",
    ),
    "meta": (
        "graftstack meta data=omniglot data.path=omniglot.parquet method=prototypes train.num_ways=60 "
        "train.num_queries=5",
        "graftstack meta data=image_folder data.path=birds backbone=resnet18 method=prototypes num_episodes=0 "
        "backbone.weights=DEFAULT eval.num_ways=[5,20] eval.num_shots=[1,5]",
        "graftstack meta data=omniglot data.path=omniglot.parquet method=maml episodes_per_step=32 "
        "cluster.num_workers=8",
        "graftstack meta name=characters resume=true",
    ),
    "pipeline": (
        "graftstack pipeline data=image_folder data.path=flowers backbone=resnet18 backbone.weights=DEFAULT "
        "space.freeze_depth=[4,all] space.lr=[1e-4,1e-3] top=3 'base_models=[{probe:{}}]' time_limit_s=3600",
        "graftstack pipeline name=flowers resume=true",
    ),
}


_BASE_MODELS = (
    "Base models: a list in brackets, quoted for the shell where it holds braces.",
    "  LogisticRegression                     any classifier or regressor of scikit-learn, by the name of its class",
    "  LGBMClassifier, XGBClassifier          boosted trees (pip install 'graftstack[boosting]')",
    "  {RandomForestClassifier:{n_estimators:500,name:forest}}   with parameters, and a name of its own",
    "  {finetune:{freeze_depth:2,lr:1e-3}}    a fine-tuning, with the keys below where they aren't given",
    "  {probe:{freeze_depth:all}}             a classifier on the outputs of frozen layer groups (estimator:NAME)",
    "  run:RUN                                a finetune run; from_sweep=RUN top=K for the best trials of a sweep",
    "Columns of a table are encoded inside each fold, as suits the base model; missing values and text are welcome.",
)

_SPACE = (
    "The space: which keys vary, and over what. A key is any of those below that say what is trained, or the last",
    "part of one; a value is what the key takes. Quote parentheses for the shell.",
    "  space.lr=[1e-4,1e-3,1e-2]              each of these values; a single one needs no brackets",
    "  space.freeze_depth=[0,2,all]           layer groups that stay as they are",
    "  space.backbone=[resnet18,vgg11]        also optimizer, schedule, recipe; no other value of their files",
    "  'space.lr=loguniform(1e-5,1e-2)'       from a range; with search=random or search=optuna",
    "  'space.weight_decay=uniform(0,0.1)'    from a range, evenly",
    "  'space.epochs=randint(5,20)'           whole numbers, both ends included",
)

_OPTIONS = {
    "-v": "say where an error was met, and let Ray's own loggers speak",
    "--spec PATH": "run the job in a file, as submit sends it; if it was begun, it goes on",
}
_MORE_OPTIONS = {"stack": {"--check-leakage": "stack on shuffled labels, of which nothing can be learnt"}}

_NOTES = {"sweep": _SPACE, "stack": _BASE_MODELS, "pipeline": (*_SPACE, *_BASE_MODELS)}


def job_help(job: str) -> str:
    """Returns the text of ``graftstack JOB --help``."""
    config_type = JOBS[job]
    lines = [
        f"usage: graftstack {job} [key=value ...] [-v] | --spec PATH",
        "",
        (config_type.__doc__ or "").strip(),
        *_notes(job),
        "",
        "Options:",
        *(f"  {option:<20} {text}" for option, text in (_OPTIONS | _MORE_OPTIONS.get(job, {})).items()),
        "",
        "Choices (group=NAME picks a file of conf/group/):",
        *(f"  {group}=" + "|".join(names) for group, names in _groups()),
        "",
        "Keys and their defaults:",
    ]
    for section, docs in groupby(key_docs(config_type), key=_section):
        lines += ["", f"  {section}"] if section else [""]
        lines += [_key_line(doc) for doc in docs]
    lines += ["", "Examples:", *(f"  {example}" for example in _EXAMPLES[job])]
    return "\n".join(lines)


def pods_help() -> str:
    """Returns what ``graftstack submit --help`` says of the pods of a job."""
    docs = (doc._replace(key=f"{PREFIX}{doc.key}") for doc in key_docs(K8sConfig))
    return "\n".join(["--to k8s: keys of the pods, and their defaults:", *map(_key_line, docs)])


def _notes(job: str) -> list[str]:
    return ["", *_NOTES[job]] if job in _NOTES else []


def _section(doc: KeyDoc) -> str:
    return doc.key.rpartition(".")[0]


def _key_line(doc: KeyDoc) -> str:
    typed = f"{doc.key}={doc.default}"
    gap = " " * max(1, _WIDTH - len(typed))
    text = f"    {typed}{gap} {' '.join(doc.text.split())}"
    return textwrap.fill(text, _LINE, subsequent_indent=" " * (_WIDTH + 5), break_on_hyphens=False)


def _groups() -> list[tuple[str, list[str]]]:
    folders = sorted(path for path in conf_dir().iterdir() if path.is_dir())
    return [(folder.name, sorted(file.stem for file in folder.glob("*.yaml"))) for folder in folders]
