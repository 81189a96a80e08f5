"""The help of a job: its keys, what they mean and what they are unless given."""

from itertools import groupby

from graftstack.config.docs import KeyDoc, key_docs
from graftstack.config.jobs import JOBS
from graftstack.config.paths import conf_dir

_WIDTH = 34

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
}


_NOTES = {
    "sweep": (
        "The space: which keys vary, and over what. A key is any of those below that say what is trained, or the last",
        "part of one; a value is what the key takes. Quote parentheses for the shell.",
        "  space.lr=[1e-4,1e-3,1e-2]              each of these values; a single one needs no brackets",
        "  space.freeze_depth=[0,2,all]           layer groups that stay as they are",
        "  space.backbone=[resnet18,vgg11]        also optimizer, schedule, recipe; no other value of their files",
        "  'space.lr=loguniform(1e-5,1e-2)'       from a range; with search=random or search=optuna",
        "  'space.weight_decay=uniform(0,0.1)'    from a range, evenly",
        "  'space.epochs=randint(5,20)'           whole numbers, both ends included",
    )
}


def job_help(job: str) -> str:
    """Returns the text of ``graftstack JOB --help``."""
    config_type = JOBS[job]
    lines = [
        f"usage: graftstack {job} [key=value ...] [-v]",
        "",
        (config_type.__doc__ or "").strip(),
        *_notes(job),
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


def _notes(job: str) -> list[str]:
    return ["", *_NOTES[job]] if job in _NOTES else []


def _section(doc: KeyDoc) -> str:
    return doc.key.rpartition(".")[0]


def _key_line(doc: KeyDoc) -> str:
    typed = f"{doc.key}={doc.default}"
    gap = " " * max(1, _WIDTH - len(typed))
    return f"    {typed}{gap} {' '.join(doc.text.split())}"


def _groups() -> list[tuple[str, list[str]]]:
    folders = sorted(path for path in conf_dir().iterdir() if path.is_dir())
    return [(folder.name, sorted(file.stem for file in folder.glob("*.yaml"))) for folder in folders]
