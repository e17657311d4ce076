"""The table of a test, as text."""

from typing import TYPE_CHECKING

from maml.training.evaluate import SHOWN, Series, TestResult, series

if TYPE_CHECKING:
    from maml.settings.settings import Settings


def table(result: TestResult, settings: "Settings", iteration: int) -> str:
    """The result as text, under the protocol it was got by."""
    split = {"val": "meta-validation", "test": "meta-test"}[settings.split]
    baseline = f", {settings.baseline}" if settings.baseline else ""
    head = f"{settings.datasource} {settings.task} after {iteration} iterations"
    tasks, queries = settings.num_test_tasks, settings.test_num_query
    each = "query per class" if settings.classification else f"query point{'s' * (queries > 1)}"
    protocol = f"{tasks} {split} tasks, {queries} {each}"
    protocol += "" if settings.inner_lr is None else f", α {settings.inner_lr:g}"
    if settings.network_norm == "batch_norm" and settings.tested_steps:
        over = "query set (transductive)" if settings.transductive else "support set (not transductive)"
        protocol += f", batch norm over the {over}"
    scale, digits, name = SHOWN[result.measure]

    def line(step: int, where: str, values: Series) -> str:
        mean, ci95 = scale * values.mean[step], scale * values.ci95[step]
        trained = "  as trained" if where == "query" and step == settings.trained_steps else ""
        return f"{step:>5}  {where:<8}  {mean:8.{digits}f} ± {ci95:5.{digits}f}{trained}"

    support, query = series(result.support[result.measure]), series(result.query[result.measure])
    lines = [f"{head} ({settings.method}{baseline})", protocol]
    lines += [f"{'step':>5}  {'on':<8}  {name} ± 95 % CI", line(0, "support", support)]
    lines += [line(step, "query", query) for step in range(len(query.mean))]
    if result.diverged and settings.tested_steps:
        lines.append(
            f"in {result.diverged} of {tasks} tasks the inner loop did not lower the support loss: "
            f"fewer steps (--test_num_updates) or a smaller step size may serve them better"
        )
    return "\n".join(lines)
