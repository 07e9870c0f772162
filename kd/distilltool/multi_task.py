"""Several teachers of different tasks and one student that does them all."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Generator, nn

from config import ConfigError
from kd.distilltool.adaptors import Adaptor, Results
from kd.distilltool.basic import refuse_matches
from kd.distilltool.loop import Loop
from kd.distilltool.settings import DistillationConfig, TrainingConfig
from kd.distilltool.teacher_cache import TeacherCache
from kd.distilltool.terms import Term, output_terms
from utils.streams import generator


def allot(lengths: list[int], tau: float) -> list[int]:
    """Batches of each task in an epoch of sum(lengths), in proportion to length ** tau, by largest remainders."""
    weights = [length**tau for length in lengths]
    exact = [sum(lengths) * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: sum(lengths) - sum(counts)]:
        counts[i] += 1
    return counts


class MultiTaskDistillation(Loop):
    """The loss on logits, task by task; teachers, their adaptors, the student's adaptors and loaders are dicts by task.

    An epoch has as many batches as all loaders together, in an order drawn from `seed`; with tau = 1 each of them once,
    otherwise in proportion to len(loader) ** tau. No matches.
    """

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Mapping[str, nn.Module],
        model_S: nn.Module,
        adaptor_T: Mapping[str, Adaptor],
        adaptor_S: Mapping[str, Adaptor],
        tau: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Raises ConfigError where the dicts are of different tasks."""
        DistillationConfig.require(distill_config, "distill_config")
        refuse_matches(distill_config, "MultiTaskDistillation")
        require_tasks(model_T, {"adaptor_T": adaptor_T, "adaptor_S": adaptor_S})
        super().__init__(train_config, model_S, {f"model_T[{task!r}]": model for task, model in model_T.items()})
        self.distill_config, self.model_T, self.model_S = distill_config, dict(model_T), model_S
        self.adaptor_T, self.adaptor_S, self.tau, self.seed = dict(adaptor_T), dict(adaptor_S), tau, seed
        key = distill_config.cache_teacher
        self.cache = None if key is None else TeacherCache(key)

    def count(self, dataloader: Any) -> int | None:
        """Batches of all loaders; ConfigError where a task has none of its own."""
        require_tasks(self.model_T, {"dataloader": dataloader})
        counts = [super(MultiTaskDistillation, self).count(loader) for loader in dataloader.values()]
        if None in counts:
            raise ConfigError("dataloader: every task's loader must know its length")
        return sum(count or 0 for count in counts)

    def batches(self, dataloader: Any, epoch: int) -> Iterator[Any]:
        """(task, batch) pairs; a loader that ends starts again."""
        counts = allot([len(loader) for loader in dataloader.values()], self.tau)
        order = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
        order = order[torch.randperm(len(order), generator=generator(self.seed, "task order", epoch))]
        tasks = list(dataloader)
        sources = {task: super(MultiTaskDistillation, self).batches(dataloader[task], epoch) for task in tasks}
        for i in order.tolist():
            batch = next(sources[tasks[i]], None)
            if batch is None:
                sources[tasks[i]] = iter(dataloader[tasks[i]])
                batch = next(sources[tasks[i]])
            yield tasks[i], batch

    def generators(self, dataloader: Any) -> list[Generator]:
        """Those of every task's loader."""
        every = [g for x in dataloader.values() for g in super(MultiTaskDistillation, self).generators(x)]
        return list({id(g): g for g in every}.values())

    def terms(self, batch: Any, args: Mapping[str, Any]) -> list[Term]:
        """Logits and losses of the batch's task."""
        (task, batch), index = batch, list[int]()
        if self.cache:
            batch, index = self.cache.split(batch)

        def compute() -> Results:
            return self.results(self.model_T[task], self.adaptor_T[task], f"adaptor_T[{task!r}]", batch, args)

        teacher = self.cache.results(task, index, self.device, compute) if self.cache else compute()
        student = self.results(self.model_S, self.adaptor_S[task], f"adaptor_S[{task!r}]", batch, args, learns=True)
        return output_terms(self.distill_config, student, teacher, f"{task}: ")


def require_tasks(models: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Raise ConfigError unless all are mappings with the same tasks."""
    for name, other in {"model_T": models, **others}.items():
        if not isinstance(other, Mapping) or other.keys() != models.keys() or not other:
            found = sorted(other) if isinstance(other, Mapping) else type(other).__name__
            tasks = sorted(models) if isinstance(models, Mapping) else "a dict of teachers by task"
            raise ConfigError(f"{name}: {found}, but the tasks are {tasks}: give a dict by task")
