"""Train with `transformers.Trainer`, which handles resuming, accumulation, evaluation, logs and devices."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from extemb_core.errors import ConfigError, TrainingError
from extemb_core.models.config import ExtensibleEmbedderConfig
from extemb_core.models.llm import LLM, choose_device
from extemb_core.training.attention import training_attention
from extemb_core.training.batches import Collator, drawn_from, held_out_samples, plan_batches, short_chunks
from extemb_core.training.checkpoints import (
    changed_settings,
    checkpoint_of,
    discard_checkpoints,
    is_finished,
    last_checkpoint,
    mark_saved,
    named_if_damaged,
    remove_incomplete,
    step_of,
    tokens_of,
)
from extemb_core.training.config import TrainingConfig, torchrun_number
from extemb_core.training.run_trainer import LOG, RunCallback, RunTrainer, append_log, mend_log
from extemb_core.training.trainable import TrainableModel, starting_point
from extemb_core.utils.files import FULL, atomic_write_text, locked_folder, make_folder, refuse_foreign
from extemb_core.utils.progress import progress

logger = logging.getLogger(__name__)

_SAME_FOR_TRAINER = ("max_steps", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "save_steps",
                     "eval_steps", "logging_steps", "seed", "dataloader_num_workers")  # fmt: skip
_OF_A_RUN = ("training.json", LOG, "data", "checkpoint-*", "stages")  # some names in its folder, or in a recipe's


@contextmanager
def full_disk_error() -> Iterator[None]:
    """Turn a full disk's error into a `TrainingError` that says how the run goes on."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        what = f"{error.filename} could not be written ({error.strerror})" if error.filename else error.strerror
        raise TrainingError(f"{what}; make room, and the same run goes on from its last whole checkpoint") from error


@full_disk_error()
def train(config: TrainingConfig, *, resume: bool = True, outdated: Sequence[Path] = ()) -> TrainableModel:
    """Train an embedder, or a reader, or both, and leave them in `config.output` (a reader in `reader/` there).

    Args:
        config: Settings of the run.
        resume: Go on from the last whole checkpoint of this run in `config.output`, if there is one. Otherwise earlier
            checkpoints there are discarded.
        outdated: Folders of runs that start from this one; a new checkpoint here discards theirs.

    Raises:
        ConfigError: The settings do not go together, the folder cannot be written to, or another run writes there.
        TrainingError: The loss is not finite, there is nothing to train on, the checkpoints in the output folder
            belong to another run, the last one is damaged, or the disk is full.
    """
    with only_run_in(Path(config.output), config.token_cache):
        return _train(config, resume, outdated)


def _train(config: TrainingConfig, resume: bool, outdated: Sequence[Path]) -> TrainableModel:
    checkpoint = checkpoint_of(config) if resume else None
    output = Path(config.output)
    llm = LLM.from_pretrained(config.llm, device=_device(config), dtype=config.dtype)
    model = starting_point(config, llm, checkpoint)
    if checkpoint is not None and is_finished(config):
        with named_if_damaged(checkpoint):
            model.load(checkpoint)  # the run is finished; the Trainer would take one more step
        model.save(output)
        mark_saved(checkpoint)
        return model
    settings = model.embedder.config if model.embedder is not None else ExtensibleEmbedderConfig(ratios=(1,))
    ratios, chunk_sizes = drawn_from(config, settings)
    # Steps are counted on from the checkpoint's, which may have had another size.
    lag = 0
    if checkpoint is not None:
        lag = tokens_of(checkpoint, config) - step_of(checkpoint) * config.tokens_per_step
    counted = replace(config, total_tokens=config.total_tokens - lag)
    batches = plan_batches(counted, llm, min(ratios), chunk_sizes)
    held_out = held_out_samples(config, llm)
    longest = max(short_chunks(config, chunk_sizes)) if held_out is not None else 0
    if is_first_process():  # only now that this run can begin
        if checkpoint is None:
            discard_checkpoints(output)
        remove_incomplete(output)
        mend_log(output)
    logger.info("%d steps of %d tokens at most", counted.max_steps, config.tokens_per_step)
    before = None  # checkpoint with the optimiser's state of the run that this one starts from
    if checkpoint is None and config.start_from is not None:
        before = last_checkpoint(Path(config.start_from))
    with progress("train", counted.max_steps) as advance:
        trainer = RunTrainer(
            model=model,
            args=_arguments(counted, llm, evaluate=held_out is not None),
            train_dataset=batches,
            eval_dataset=held_out,
            data_collator=Collator(ratios, chunk_sizes, config.seed, config.ratios_per_sample),
            callbacks=[RunCallback(config, advance, lag, outdated), *_tensorboard(output)],
            config=config,
            optimizer_from=before,
            eval_collators={f"ratio_{r}": Collator([r], [longest], 0) for r in ratios},
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.is_world_process_zero():
            if checkpoint is not None and (changed := changed_settings(checkpoint, config)):
                append_log(config, {"step": step_of(checkpoint), "changed": changed})
            elif checkpoint is None and (output / LOG).exists():
                append_log(config, {"step": 0, "begins": "anew"})
            atomic_write_text(output / "training.json", json.dumps(asdict(config), indent=2))
        with training_attention(*model.transformers()):
            if held_out is not None and checkpoint is None:
                trainer.evaluate()
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.train(False)
    if trainer.is_world_process_zero():
        model.save(output)
        mark_saved(output / f"checkpoint-{trainer.state.global_step}")
    trainer.accelerator.wait_for_everyone()  # otherwise another process would look for files that are not written yet
    return model


@contextmanager
def only_run_in(output: Path, *others: Path) -> Iterator[None]:
    """Make a run's folder and keep other runs out of it; if this run cannot begin, remove the folders it made.

    Complete token files stay, for the next run.

    Raises:
        ConfigError: The folder cannot be made or written to, another run writes there, or it holds other files.
    """
    made = {folder for one in (output, *others) for folder in (one, *one.parents) if not folder.exists()}
    make_folder(output, ConfigError, "pass another output")
    if not any(found for name in _OF_A_RUN for found in output.glob(name)):
        foreign = [file.name for file in output.iterdir() if file.is_file() and not file.name.startswith(".")]
        refuse_foreign(output, foreign, "a run's", ConfigError)
    with locked_folder(output) if is_first_process() else nullcontext(True) as alone:
        if not alone:
            raise ConfigError(f"{output} is being written by another run; wait for that, or pass another output")
        try:
            yield
        except BaseException:
            for folder in sorted(made, key=lambda folder: -len(folder.parts)) if is_first_process() else ():
                with suppress(OSError):  # missing, or not empty
                    if all(file.suffix == ".lock" for file in folder.iterdir()):
                        shutil.rmtree(folder)
            raise


def is_first_process() -> bool:
    """Return whether this is the one of those that train together that writes files."""
    return torchrun_number("RANK") == 0


def _device(config: TrainingConfig) -> str:
    """Choose the Trainer's device; of several processes, each takes the GPU of its local rank."""
    chosen = choose_device(config.device)
    if chosen.type != "cuda":
        return str(chosen)
    rank = torchrun_number("LOCAL_RANK")
    if chosen.index not in (None, rank):
        raise ConfigError(
            f"device={config.device!r}: training takes the visible GPUs in order; pass device='cuda' and choose with "
            "CUDA_VISIBLE_DEVICES"
        )
    return f"cuda:{rank}"


def _arguments(config: TrainingConfig, llm: LLM, *, evaluate: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        **{name: getattr(config, name) for name in _SAME_FOR_TRAINER},
        output_dir=config.output,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation_steps,
        lr_scheduler_type="linear",
        save_total_limit=2,
        eval_strategy="steps" if evaluate else "no",
        report_to="none",  # the callbacks write the logs
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=llm.device.type == "cpu",
        bf16=llm.dtype == torch.bfloat16,
        dataloader_pin_memory=llm.device.type == "cuda",
        label_names=[],
    )
    if arguments.n_gpu > 1:  # use one process per GPU (torchrun): DataParallel cannot split samples
        arguments._n_gpu = 1
    return arguments


def _tensorboard(output: Path) -> list[TrainerCallback]:
    if not importlib.util.find_spec("tensorboard") or not is_first_process():
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(output / "tensorboard")))]
