"""The graders of the packages behind one name, for a grading pool."""


def grade(prediction: str, gold: str, task: str) -> float:
    """1.0 where the text answers the task rightly."""
    from common.answers.gsm8k import grade_gsm8k
    from common.answers.tasks import grade_task

    if task == "gsm8k" and "####" in prediction:
        return float(grade_gsm8k(prediction, gold))
    return float(bool(grade_task(task, prediction, gold, answer=gold).correct))
