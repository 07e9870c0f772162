"""Distil a small text classifier from a larger one, by kd.distilltool: the toolkit's worked example.

    python kd/distill_text.py --config_path config/kd/text/docstrings.yaml                       # no download
    python kd/distill_text.py --config_path config/kd/text/ag_news.yaml dataset.data_dir=FOLDER

A BERT from nothing is trained on all training documents; students of fewer layers learn from some of them: alone, or
also from the teacher's logits, hidden states and attentions, each from drawn weights or from copied layers. Every arm
tries the same learning rates; validation chooses. The same command resumes. Teachers stay in pretrained_dir and serve
every student, also after --overwrite; `student/` in the run folder loads with transformers.
"""

if __name__ == "__main__":  # thread settings count only before torch is imported
    from utils.launch import prepare

    prepare()

import shutil
from pathlib import Path
from statistics import mean
from typing import Any

from config import CommandLine, ConfigError, Resolved, nested
from kd.distilltool import expose_attentions
from kd.teacher import sha256
from kd.text_config import ARMS, DistillTextConfig, run_folder
from kd.text_lab import Fit, TextLab, open_lab
from kd.text_report import parameters, score_table, search_table, size_table, speeds, write_tables
from utils.dry_run import print_values
from utils.encoder import load_tokenizer
from utils.init_script import init_script
from utils.program import leave, run_program
from utils.report import plain_table
from utils.run_folder import REPOSITORY, RunFolder, claim
from utils.stopping import stop_flag


def distil(resolved: Resolved[DistillTextConfig], command: CommandLine) -> None:
    """One run: teacher, students, table."""
    cfg = resolved.config
    if command.dry_run:
        print_values(resolved, run_folder(cfg))
        s = cfg.student
        print(f"students: {len(s.arms)} arms x {len(s.lr)} learning rates x {len(s.seeds)} seeds")
        return
    with init_script(command.gpu, cfg.tf32, cfg.seed, cfg.debug) as world, stop_flag() as flag:
        if world.size > 1:
            raise ConfigError(
                f"torchrun: {world.size} processes, but one trains all students of a run: start it without"
            )
        folder = RunFolder(run_folder(cfg), nested(cfg), world, command.overwrite)
        if not folder.said_finished():
            finish(open_lab(cfg, world, flag), folder)


def finish(lab: TextLab, folder: RunFolder) -> None:
    """Train what is not trained yet: every arm, learning rate and seed. Then choose on validation, time, report."""
    cfg, s = lab.cfg, lab.cfg.student
    path, of_teacher = lab.teacher()
    claim(folder.folder, {"corpus": lab.corpus.fingerprint, "teacher": sha256(path)})
    teacher = lab.loaded(cfg.teacher, path)
    said = lab.said(teacher, lab.parts[2])
    if cfg.attention:
        expose_attentions(teacher)
    fits = {
        (arm, lr): [Fit(folder.folder / "students" / f"{arm}_lr{lr:g}_seed{seed}", arm, lr, seed) for seed in s.seeds]
        for arm in s.arms
        for lr in s.lr
    }
    found = {key: [lab.result(fit, s, teacher, said) for fit in some] for key, some in fits.items()}
    held = {key: mean(x["val_micro"] for x in rows) for key, rows in found.items()}
    chosen = {arm: max(((arm, lr) for lr in s.lr), key=held.__getitem__) for arm in s.arms}
    rows = {arm: found[key] for arm, key in chosen.items()}
    last = chosen["distilled" if "distilled" in s.arms else s.arms[-1]]
    kept = fits[last][max(range(len(s.seeds)), key=lambda i: found[last][i]["val_micro"])]
    models = {"teacher": lab.loaded(cfg.teacher, path), "student": lab.loaded(s, kept.weights)}
    export(lab, models["student"], folder.folder / "student")
    rates = dict(zip(models, speeds([*models.values()], lab.parts[2], s.batch_size, lab.world.device), strict=True))
    worth, size = score_table(lab, of_teacher, rows), size_table(lab, models, rates)
    scores = {"teacher": [of_teacher["test_micro"]]} | {ARMS[a]: [x["test_micro"] for x in f] for a, f in rows.items()}
    write_tables(lab, folder.folder, [worth, size, search_table(found)], kept, scores)
    folder.finish({
        "teacher": of_teacher, "students": rows, "student": kept.folder.name, "documents_per_second": rates,
        "parameters": {name: parameters(model) for name, model in models.items()},
    })  # fmt: skip
    print("\n\n".join(plain_table(table) for table in (worth, size)))


def export(lab: TextLab, student: Any, folder: Path) -> None:
    """The student with its word pieces, as transformers loads them; the folder appears whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    student.save_pretrained(part)
    load_tokenizer(lab.scratch[lab.cfg.student.width]).save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


TAKES = (DistillTextConfig, ())


def main() -> int:
    """Exit status."""
    return run_program(__doc__ or "", REPOSITORY, *TAKES, distil)


if __name__ == "__main__":
    leave(main())
