"""Check the encoder suite: a skill alone is PEFT's adapter, and what merging by the mean costs."""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
from peft import PeftModel

from dynmerge.evaluation.scores import score
from dynmerge.student import Student
from study.encoder import adapter_folder, bank_of, examples, model


def main() -> None:
    """Print test accuracy by task: zero-shot, its adapter alone, the mean of all adapters."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    torch.set_num_threads(1)
    bank = bank_of(seed)
    student = Student(model(), bank)
    single = [[module.core(task) for module in bank.modules] for task in range(len(bank.names))]
    mean = [torch.stack(cores).mean(0) for cores in zip(*single, strict=True)]
    found = []
    for place, name in enumerate(bank.names):
        asked = examples(name, "test", student.model)
        row = []
        for carried in (nullcontext(), student.under(single[place]), student.under(mean)):
            with carried:
                row.append(score(asked).accuracy)
        found.append(row)
        print(
            name,
            *(f"{share:.3f}" for share in row),
            f"{difference(student, single[place], name, seed):.1e}",
        )
    columns = zip(*found, strict=True)
    print("average", *(f"{sum(column) / len(column):.3f}" for column in columns))


@torch.no_grad()
def difference(student: Student, cores: list[torch.Tensor], name: str, seed: int) -> float:
    """The largest difference of a logit between the bank's skill and PEFT's model."""
    peft = PeftModel.from_pretrained(model(), adapter_folder(seed, name)).eval()
    some = list(range(32))
    with student.under(cores):
        ours = examples(name, "test", student.model).logits(some)
    return float((ours - examples(name, "test", peft).logits(some)).abs().max())


if __name__ == "__main__":
    main()
