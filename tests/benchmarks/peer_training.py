"""One trial as commonly trained with PEFT: rows padded on the right, a prompt in every row.

Logits are computed at every token. Tokenised rows are held in memory and batches are the same as
ours. Answers are one token each, so that an evaluation is one forward. ``PlainTrial`` is a plain
torch loop, ``trainer`` the transformers Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.data.batches import step_rows
from orchestrator.data.encoding import Encoded
from orchestrator.job.space import TrialSpec
from orchestrator.tuning.prompts.inits import InitContext, initial_prompt

IGNORED = -100
FORWARD_ROWS = 64  # rows of a forward in an evaluation


@dataclass(frozen=True)
class Data:
    """Rows to train and evaluate on; ``answers`` has the token of each label."""

    train: Encoded
    validation: Encoded
    answers: tuple[int, ...]
    pad: int

    @classmethod
    def of(cls, task: Any) -> Data:
        """Return the data of our tokenised task.

        Raises ValueError for answers of several tokens, which would need a forward each.
        """
        encoder = task.encoder
        if any(len(ids) != 1 for ids in encoder.scored_answers):
            raise ValueError(f"peers need answers of one token: {encoder.scored_answers}")
        pad = encoder.tokenizer.pad_token_id
        answers = tuple(ids[0] for ids in encoder.scored_answers)
        return cls(
            task.splits["train"], task.splits["validation"], answers, 0 if pad is None else pad
        )


def padded(split: Encoded, rows: Sequence[int], pad: int) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels [B, T] of the rows.

    Only targets have labels.
    """
    whole = [[*split.inputs[row], *split.targets[row]] for row in rows]
    width = max(map(len, whole))
    labels = [
        [*[IGNORED] * len(split.inputs[row]), *split.targets[row], *[IGNORED] * (width - len(ids))]
        for row, ids in zip(rows, whole, strict=True)
    ]
    return {
        "input_ids": torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in whole]),
        "attention_mask": torch.tensor(
            [[*[1] * len(ids), *[0] * (width - len(ids))] for ids in whole]
        ),
        "labels": torch.tensor(labels),
    }


def start_ids(spec: TrialSpec, tokenizer: Any) -> list[int]:
    """Return the tokens of the trial's initial prompt, found without a model.

    Raises ValueError for an init that does not start from tokens.
    """
    if spec.init != "sample_vocab":
        raise ValueError(f"init {spec.init} does not start from tokens; write sample_vocab")
    numbers = InitContext(lambda ids: ids[:, None], (len(tokenizer), 1), tokenizer, ())
    return [int(number) for number in initial_prompt(spec, numbers)]


def with_prompt(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Wrap the frozen model in PEFT's prompt tuning, as the trial's configuration says.

    The prompt starts from the tokens in ``start``, or from tokens that PEFT samples.
    """
    import peft

    torch.manual_seed(config["seed"])
    wrapped: nn.Module = peft.get_peft_model(
        model,
        peft.PromptTuningConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            num_virtual_tokens=config["num_virtual_tokens"],
            prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB,
        ),
    )
    if "start" in config:
        (prompt,) = (parameter for parameter in wrapped.parameters() if parameter.requires_grad)
        with torch.no_grad():
            prompt.copy_(
                model.get_input_embeddings().weight[config["start"]]  # type: ignore[operator, index]
            )
    return wrapped


def chosen(logits: Tensor, labels: Tensor, answers: Sequence[int]) -> Tensor:
    """Return the index of the likeliest answer of each row [B].

    ``logits`` [B, P + T, V] begin with those of the prompt.
    """
    # The logits one position before the target's first token predict that token.
    first = (labels != IGNORED).int().argmax(1)
    place = first - 1 + logits.shape[1] - labels.shape[1]
    return logits[torch.arange(len(labels)), place][:, list(answers)].argmax(1)


class PlainTrial:
    """A trial trained by a plain torch loop."""

    def __init__(self, model: nn.Module, data: Data, config: Mapping[str, Any], batch: int) -> None:
        self.step = 0
        self._data = data
        self._seed = config["seed"]
        self._batch = batch
        self._tuned = with_prompt(model, config)
        prompt = [parameter for parameter in self._tuned.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(prompt, lr=config["learning_rate"], weight_decay=0.0)

    def train(self, steps: int) -> float:
        """Train for ``steps`` further steps and return their mean loss."""
        total = 0.0
        for _ in range(steps):
            rows = step_rows(len(self._data.train), self._batch, self._seed, self.step)
            self._optimizer.zero_grad()
            loss = self._tuned(**padded(self._data.train, rows, self._data.pad)).loss
            loss.backward()
            self._optimizer.step()
            total += float(loss.detach())
            self.step += 1
        return total / steps

    @torch.inference_mode()
    def accuracy(self) -> float:
        split, right = self._data.validation, 0
        for start in range(0, len(split), FORWARD_ROWS):
            rows = range(start, min(start + FORWARD_ROWS, len(split)))
            batch = padded(split, rows, self._data.pad)
            labels = batch.pop("labels")
            found = chosen(self._tuned(**batch).logits, labels, self._data.answers)
            right += sum(
                int(place) == split.labels[row] for place, row in zip(found, rows, strict=True)
            )
        return right / len(split)


class Rows(torch.utils.data.Dataset[dict[str, int]]):
    """Row numbers in the order of ``numbers``; the collator makes tensors of whole batches."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> dict[str, int]:
        return {"row": self._numbers[place]}


def trainer(
    model: nn.Module,
    data: Data,
    config: Mapping[str, Any],
    setting: Mapping[str, Any],
    report: Callable[..., None],
) -> Any:
    """Return a transformers Trainer for the trial, without checkpoints.

    ``report(step, accuracy)`` is called after every evaluation. ``setting`` has ``steps``,
    ``batch``, ``every`` and a ``folder`` to write to.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    train = [
        row
        for step in range(setting["steps"])
        for row in step_rows(len(data.train), setting["batch"], config["seed"], step)
    ]

    class Reporting(TrainerCallback):  # type: ignore[misc]
        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any
        ) -> None:
            report(state.global_step, metrics["eval_accuracy"])

    return Trainer(
        model=with_prompt(model, config),
        args=TrainingArguments(
            output_dir=str(setting["folder"]),
            max_steps=setting["steps"],
            learning_rate=config["learning_rate"],
            per_device_train_batch_size=setting["batch"],
            per_device_eval_batch_size=FORWARD_ROWS,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            seed=config["seed"],
            eval_strategy="steps",
            eval_steps=setting["every"],
            logging_steps=setting["every"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=Rows(train),
        eval_dataset=Rows([len(data.train) + row for row in range(len(data.validation))]),
        data_collator=lambda rows: _collated(data, [row["row"] for row in rows]),
        compute_metrics=lambda found: _accuracy(data, found),
        preprocess_logits_for_metrics=lambda logits, labels: chosen(
            logits[0] if isinstance(logits, tuple) else logits, labels, data.answers
        ),
        callbacks=[Reporting()],
    )


def _collated(data: Data, numbers: Sequence[int]) -> dict[str, Tensor]:
    """Return the tensors of a batch; validation rows are numbered after the training rows."""
    count = len(data.train)
    if numbers[0] < count:
        return padded(data.train, numbers, data.pad)
    return padded(data.validation, [number - count for number in numbers], data.pad)


def _accuracy(data: Data, found: Any) -> dict[str, float]:
    right = sum(
        int(place) == label
        for place, label in zip(found.predictions, data.validation.labels, strict=True)
    )
    return {"accuracy": right / len(data.validation)}
