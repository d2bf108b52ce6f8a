"""From audio to batches, log-mels, windows and the loss of an update; and what differs between machines: float16 and
its overflow, several GPUs, several processes, memory that runs out. Without a GPU the mechanism runs on the CPU: its
autocast and GradScaler, gloo processes."""

import types
from collections import Counter

import kills
import numpy as np
import pandas
import pytest
import torch
from conftest import IN_TWO, MODEL, corpus_audio, load_json, refused, scored_clips, succeeded, tensorboard
from datasets import Dataset
from helpers import RATE, WATCHED, model_with, noise, one_table, run_main, seen, skipped, sound
from safetensors.torch import load_file
from small_model import inputs_of, label_encoder, make_clips, make_decoder, make_trainer, processor, random_model
from transformers import AutoModelForCTC, TrainerCallback, TrainingArguments

import finetune_medasr as script

TWO_A_STEP = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1]


@pytest.fixture(scope="module")
def clips():
    """(train, dev) of a few clips of unequal lengths."""
    train = make_clips("train", *(("The patient has a fever.", noise(1.5, seed)) for seed in range(2)))
    dev = [("Give 200 mg.", noise(1.9, 5)), ("No cough.", noise(0.7, 6)), ("A book, 11 letters", noise(1.2, 7))]
    return train, make_clips("dev", *dev)


def watched_model(limit):
    """(a model on a GPU that holds so many clips at a time, clips and frames of each batch that it is given)"""
    model, shapes = random_model(), []

    def watch(module, inputs, options):
        shapes.append(tuple(options["input_features"].shape[:2]))
        if len(options["input_features"]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(watch, with_kwargs=True)
    return model, shapes


def rows_of(*texts_and_samples):
    return [{"text": text, "samples": samples} for text, samples in texts_and_samples]


def test_a_clip_is_left_out_exactly_where_it_cannot_be_trained_on_or_scored(tmp_path):
    """A training clip where its CTC loss would be infinite, too; dev and test clips never for their length."""
    rows, encoder, too_many = [], label_encoder(), "more labels than frames"
    for text in ("5z5z5", "5zz55", "555555", "200 mg too good"):
        labels = torch.tensor(encoder([text])[0])
        for logits in range(1, 3 * len(labels)):
            scores = torch.zeros(logits, 1, encoder.vocab_size).log_softmax(-1)
            lengths = torch.tensor([logits]), torch.tensor([len(labels)])
            loss = torch.nn.functional.ctc_loss(scores, labels[None], *lengths)
            # Two convolutions of kernel 5 and stride 2 over frames of 400 samples every 160.
            rows.append(("train", text, 400 + 160 * (4 * logits + 8), "" if torch.isfinite(loss) else too_many))
    assert len({reason for *_, reason in rows}) == 2
    rows += [
        ("train", "no", 2319, "too short"), ("train", "yes yes", 2320, too_many), ("train", " \t", RATE, "empty text"),
        ("dev", "", RATE, "empty text"), ("test", " ", RATE, "empty text"), ("test", "日本", RATE, ""),
        ("train", "日本", RATE, "no text left that the tokenizer covers"), ("train", "no", 64_240, ""),
        ("train", "no", 64_241, "over --max_train_seconds"), ("train", "yes " * 200, 3 * RATE, too_many),
        ("test", "yes " * 200, 3 * RATE, ""),
        *[(split, "no", samples, "") for split in ("dev", "test") for samples in (1, 2319, 5 * RATE)],
    ]  # fmt: skip
    table = pandas.DataFrame(rows, columns=["split", "text", "samples", "reason"])
    table["file_name"] = [f"{number}.wav" for number in table.index]
    audio = {row.file_name: sound(noise(1 + row.samples / RATE)[: row.samples]) for row in table.itertuples()}
    one_table(tmp_path, table[["file_name", "text", "split"]].to_dict("records"), audio)
    flags = f"""--model {MODEL} --dataset . --data_dir audio --output_dir out --max_train_seconds 4.015 --max_steps 1
        --max_train_samples 1 --max_eval_samples 1 --skip_baseline --num_proc 1 --dataloader_num_workers 0"""
    succeeded(run_main(tmp_path, *flags.split()))
    reasons = {clip: reason.split(":")[0] for _, clip, reason in skipped(tmp_path / "out")}
    assert reasons == {row.file_name: row.reason for row in table.itertuples() if row.reason}


def test_the_loss_of_a_batch_is_the_mean_over_its_clips_and_padding_is_silence():
    model, encoder, texts = random_model(), label_encoder(), ["200 mg, too good", "No."]
    clips = list(zip(texts, (noise(1.5, 1), noise(0.8, 2))))
    batch = inputs_of(rows_of(*clips), encoder=encoder)
    long, short = encoder(texts)
    assert batch["labels"].tolist() == [long, short + [-100] * (len(long) - len(short))]
    assert batch["attention_mask"].sum(-1).tolist() == [148, 78]  # 1 + (samples - 400) // 160
    assert (batch["input_features"][1, 80:] == np.float32(np.log(1e-5))).all()
    alone = [model(**inputs_of(rows_of(clip), encoder=encoder)).loss.item() for clip in clips]
    assert 0 < model(**batch).loss.item() == pytest.approx(np.mean(alone), rel=1e-4)
    assert inputs_of(rows_of(("", noise(0.01))), shortest=2320)["attention_mask"].shape == (1, 13)


@pytest.mark.parametrize("flags", ["", "--per_device_eval_batch_size 1", "--per_device_eval_batch_size 3"])
def test_neither_other_clips_nor_padding_change_the_text_of_a_clip(tmp_path, flags):
    sounds = [("", noise(seconds, seed)) for seed, seconds in enumerate((0.9, 8.0, 0.01, 7.0, 2.2))]
    decoder = make_decoder(tmp_path, "--window_seconds", 6, *flags.split())
    alone = [decoder.texts(decoder.emissions(make_clips("test", sound))[0])[0] for sound in sounds]
    together = make_clips("test", *sounds)
    order = together.table["clip"].str.removeprefix("session/test-").astype(int)
    assert decoder.texts(decoder.emissions(together)[0]) == [alone[number] for number in order]
    assert len(set(alone)) == 5 and len(alone[1]) > 50


def test_log_mels_are_those_of_the_extractor():
    extractor, generator = processor().feature_extractor, np.random.default_rng(0)
    speech, loud = script.decode_audio(next(iter(corpus_audio("test").values()))), np.clip(50 * noise(3), -1, 1)
    tone, hiss = np.sin(2 * np.pi * 1_000 * np.arange(RATE) / RATE), generator.normal(scale=0.1, size=2 * RATE)
    sounds = [speech, loud, tone, hiss, hiss[:RATE] / 1_000, np.zeros(RATE), np.ones(RATE)]
    sounds = [samples.astype(np.float32) for samples in sounds]
    options = dict(sampling_rate=RATE, padding="longest", return_attention_mask=True, return_tensors="pt")
    for batch in [*([samples] for samples in sounds), sounds]:
        expected, found = extractor(batch, **options), inputs_of(rows_of(*(("", samples) for samples in batch)))
        assert torch.equal(found["attention_mask"], expected["attention_mask"])
        assert found["input_features"].dtype == torch.float32
        torch.testing.assert_close(found["input_features"], expected["input_features"], atol=1e-3, rtol=0)


def masked_rows(*seconds, seed):
    """(log-mels as they are, the same with SpecAugment's masks, lengths in frames) of clips of noise."""
    hiss = np.random.default_rng(0).normal(scale=0.1, size=10 * RATE).astype(np.float32)  # nowhere silent
    rows = [{"text": "", "samples": hiss[: round(s * RATE)], "clip": f"clip-{n}"} for n, s in enumerate(seconds)]
    plain, masked = inputs_of(rows), inputs_of(rows, seed=seed)
    # The narrowest of the lowest mel filters lie between two frequencies of the transform, and hear nothing.
    bins = (plain["input_features"][0] > np.log(1e-5) + 1).any(0)
    return plain["input_features"][..., bins], masked["input_features"][..., bins], plain["attention_mask"].sum(-1)


def test_spec_augment_masks_bands_and_stretches_with_silence_inside_the_clip():
    for seed in range(5):
        for plain, clip, length in zip(*masked_rows(10.0, 2.53, 0.42, 0.15, seed=seed)):
            masked = clip[:length] != plain[:length]
            assert torch.equal(plain[length:], clip[length:])
            assert (clip[:length][masked] == np.float32(np.log(1e-5))).all()
            bins, frames = masked.all(0), masked.all(1)
            assert (masked == (bins[None] | frames[:, None])).all()  # whole bands and whole stretches
            assert bins.sum() <= 2 * 20 and frames.sum() <= min(30, length // 5) * -(-length // 250)
    plain, clips, _ = masked_rows(*[5.0] * 20, seed=1)
    masked = plain != clips
    assert min(masked.all(1).any(1).float().mean(), masked.all(2).any(1).float().mean()) > 0.8
    assert 0.05 < masked.float().mean() < 0.5


def test_masks_depend_on_seed_epoch_and_clip_alone():
    def masks(name, seed, epoch, *more):
        rows = [{"text": "", "samples": noise(5), "clip": name}, *more]
        return inputs_of(rows, seed=seed, epoch=torch.tensor(epoch))["input_features"][0, :498]

    assert torch.equal(masks("a", 1, 2), masks("a", 1, 2, {"text": "", "samples": noise(6), "clip": "c"}))
    for other in (("a", 1, 3), ("a", 2, 2), ("b", 1, 2)):
        assert not torch.equal(masks("a", 1, 2), masks(*other))


@pytest.mark.parametrize("workers, live_on", [(0, False), (1, False), (1, True)])
def test_the_masks_of_a_clip_differ_between_the_epochs_of_a_training(tmp_path, clips, workers, live_on):
    flags = ["--num_train_epochs", 3, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2]
    flags += ["--dataloader_num_workers", workers, "--dataloader_persistent_workers", live_on]
    two = make_clips("train", *(("No fever.", noise(seconds)) for seconds in (1.5, 1.2)))
    trainer, masked = make_trainer(tmp_path, (two, clips[1]), *flags), {}

    def watch(module, inputs, options):
        features = options["input_features"]
        masked.setdefault(features.shape, set()).add(features.numpy().tobytes())

    trainer.model.register_forward_pre_hook(watch, with_kwargs=True)
    trainer.train()
    assert [len(features) for features in masked.values()] == [3, 3]


def test_dev_clips_are_never_masked_and_training_clips_may_be_left_alone(tmp_path, clips):
    encoder, extractor, (train, dev) = label_encoder(), processor().feature_extractor, clips
    plain = inputs_of(list(train.audio), encoder=encoder)["input_features"]
    for flags, is_masked in (["--no_spec_augment"], False), ([], True):
        trainer = make_trainer(tmp_path, clips, *flags)
        features = script.model_inputs(trainer.data_collator(list(train.audio)), extractor, "cpu")["input_features"]
        assert torch.equal(plain, features) != is_masked
    alone = [random_model()(**inputs_of([row], encoder=encoder)).loss.item() for row in dev.audio]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(alone), rel=1e-4)


@pytest.mark.parametrize("seconds", [6.0, 6.01, 9.5, 14.0, 17.3])
def test_logits_of_windows_are_kept_from_the_middle_of_the_overlap(tmp_path, seconds):
    """Without encoder layers a logit hears 0.2 s around it, so windows and the whole agree on each one."""

    def number_logits(module, inputs, output):  # a logit says which of its window it is, of 150 of 0.04 s
        output.logits = torch.eye(output.logits.shape[1]).expand(len(output.logits), -1, -1)

    sound, ids = make_clips("test", ("", noise(seconds, 3))), []
    for window in (60, 6, 6):
        decoder = make_decoder(tmp_path, "--window_seconds", window, model=random_model(num_hidden_layers=0))
        if len(ids) == 2:
            decoder.model.register_forward_hook(number_logits)
        ids.append(decoder.emissions(sound)[0][0].ids[:, 0].tolist())
    assert ids[0] == ids[1] and len(ids[0]) > 24 * seconds and ids[2][0] == 0
    seams = {pair for pair in zip(ids[2], ids[2][1:]) if pair[1] != pair[0] + 1}
    assert seams <= {(99, 50)}, "2 s before the end of a window, 2 s behind the beginning of the next"
    assert ids[2].count(50) == 1 + max(0, -(-round((seconds - 6) * 100) // 200))


def test_a_guarded_model_stays_finite_where_plain_float16_overflows(tmp_path, clips):
    """Parts pass float16's 65,504, as MedASR's subsampler does; the model's outputs are ordinary."""
    decoder, kinds = make_decoder(tmp_path), {}
    batch, model = inputs_of(list(clips[0].audio), encoder=label_encoder()), decoder.model
    with torch.no_grad():
        model.encoder.subsampler.dense_1.weight *= 3e6
        model.encoder.layers[1].feed_forward1.linear1.weight *= 1e7
        model.encoder.layers[1].feed_forward1.linear2.weight *= 1e-7
        expected = model(**batch).logits
        with torch.autocast("cpu", torch.float16):
            assert not torch.isfinite(model(**batch).logits).all()
    model = make_trainer(decoder, clips, half=True).model
    parts = dict.fromkeys(("subsampler.dense_1", "layers.1.feed_forward1.linear1"), torch.float32)
    parts["layers.0.self_attn.q_proj"] = torch.float16  # only what needs it is in float32
    for name in parts:
        module = model.encoder.get_submodule(name)
        module.register_forward_hook(lambda module, given, output, name=name: kinds.update({name: output.dtype}))
    with torch.autocast("cpu", torch.float16):
        with torch.no_grad():
            assert float((model.eval()(**batch).logits - expected).abs().max()) < 0.05 * float(expected.std())
        loss = model.train()(**batch).loss
    loss.backward()
    assert kinds == parts and torch.isfinite(loss)
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())
    assert model.encoder.subsampler.dense_1.weight.grad.abs().max() > 0
    with torch.no_grad():
        decoder.model.ctc_head.weight *= float("nan")
    with pytest.raises(script.RunError, match="--bf16"):
        make_trainer(decoder, clips, half=True)


def test_without_a_gpu_auto_is_eight_clips_a_step_and_a_number_is_that_number(tmp_path, clips):
    for flags, limit, split, layerdrop in [
        ("", None, (8, 4), 0.1),
        ("", 2, (2, 16), 0.1),
        ("--gradient_accumulation_steps 1", None, (8, 1), 0.1),
        ("--per_device_train_batch_size 3 --gradient_checkpointing", None, (3, 4), 0.0),
    ]:
        model = random_model(layerdrop=0.1)
        trainer = make_trainer(tmp_path, clips, *flags.split(), model=model, batch_limit=limit)
        assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == split
        assert trainer._train_batch_size == split[0] and model.encoder.layerdrop == layerdrop


class Gpu(str):
    """The CPU under the name of a GPU, for what asks which of both it has."""

    type = "cuda"


@pytest.mark.parametrize("most, chosen", [(32, 32), (5, 4), (1, 1), (0, 1)])
def test_the_largest_step_that_fits_is_chosen_and_trials_leave_no_trace(
    tmp_path, clips, monkeypatch, capsys, most, chosen
):
    model, tried = watched_model(most)
    decoder = make_decoder(tmp_path, model=model)
    before = {name: value.clone() for name, value in decoder.model.state_dict().items()}
    monkeypatch.setattr(type(decoder.settings), "device", Gpu("cpu"))
    memory = types.SimpleNamespace(total_memory=1e6)
    for name, stub in {"get_device_properties": memory, "get_rng_state": None, "set_rng_state": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, stub=stub: stub)
    trainer = make_trainer(decoder, clips)
    split = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    assert split == (chosen, 32 // chosen) and {frames for _, frames in tried} <= {148}, "the longest clip"
    assert f"32 clips an update and device: {chosen} a step" in capsys.readouterr().out
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(weight.grad is None for weight in trainer.model.parameters())


@pytest.mark.parametrize("count", [8, 5])
def test_the_loss_and_gradient_of_an_update_do_not_depend_on_its_steps(tmp_path, count):
    """Also where the last step has fewer clips than the others."""
    sounds = [(f"Patient {number} has a fever.", noise(1 + 0.4 * number, number)) for number in range(count)]
    train, logged = make_clips("train", *sounds), []
    for size, steps in ((8, 1), (4, 2), (1, 8)):
        model = random_model()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):  # in eval mode: the statistics are of a batch, however split
                module.train = lambda mode=True, module=module: module
        split = f"--per_device_train_batch_size {size} --gradient_accumulation_steps {steps}"
        flags = f"--no_spec_augment --max_steps 1 --logging_steps 1 {split}".split()
        trainer = make_trainer(tmp_path / str(size), (train, train), *flags, model=model)
        trainer.train()
        logged += [(logs["loss"], logs["grad_norm"]) for logs in trainer.state.log_history if "grad_norm" in logs]
    assert len(logged) == 3 and min(logged[0]) > 0.1
    for loss, norm in logged[1:]:
        assert loss == pytest.approx(logged[0][0], rel=1e-4) and norm == pytest.approx(logged[0][1], rel=1e-3)


def test_training_batches_are_grouped_by_length_without_decoding_audio(tmp_path, clips):
    """In one order, however the clips of an update are divided."""
    lengths = [int(length) for length in np.random.default_rng(0).integers(RATE, 20 * RATE, 160)]
    train = script.Clips(Dataset.from_list([{"audio": b"not audio", "num_samples": size} for size in lengths]), None)
    orders = []
    for size, steps in ((4, 2), (2, 4)):
        flags = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", steps]
        orders.append(list(make_trainer(tmp_path, (train, clips[1]), *flags)._get_train_sampler(train.audio)))
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(160))
    batches = [[lengths[index] for index in orders[0][start : start + 4]] for start in range(0, 160, 4)]
    assert 1 - sum(lengths) / sum(4 * max(batch) for batch in batches) < 0.15  # the padding; 0.37 in a random order
    assert [max(batch) for batch in batches] != sorted((max(batch) for batch in batches), reverse=True)


@pytest.mark.parametrize("others, share", [(1000, 0.25), (30, 0.5)])
def test_an_epoch_has_all_its_own_clips_and_a_share_of_replayed_ones_drawn_anew(tmp_path, clips, others, share):
    lengths = np.random.default_rng(0).integers(RATE, 20 * RATE, 120 + others).tolist()
    rows = Dataset.from_list([{"audio": b"not audio", "num_samples": size} for size in lengths])
    flags = *TWO_A_STEP, "--replay", f"elsewhere:{share}"
    trainer, epochs = make_trainer(tmp_path, (script.Clips(rows, None), clips[1]), *flags, own=120), []
    for epoch in (0, 1, 0):
        trainer.order.manual_seed(epoch)
        epochs.append(list(trainer._get_train_sampler(rows)))
        assert len(epochs[-1]) == round(120 / (1 - share)) == 2 * script.planned_updates(trainer.args, 120)[1]
        assert sorted(epochs[-1])[:120] == list(range(120))
    assert epochs[0] == epochs[2] != epochs[1]
    replayed = [Counter(clip for clip in epoch if clip >= 120) for epoch in epochs]
    assert {*replayed[0].values()} == {1 if others > 40 else 4}, "a small corpus is gone through more than once"
    assert (replayed[0] == replayed[1]) == (others == 30)
    padding = sum(abs(lengths[first] - lengths[second]) for first, second in zip(*[iter(epochs[0])] * 2))
    assert padding < 0.1 * sum(lengths[clip] for clip in epochs[0]), "by length, replayed or not"


def test_dev_scores_are_those_of_the_clips_and_of_each_domain(tmp_path, clips):
    texts = "Give 200 mg.", "a good book", "THE PATIENT’S 1100 books {period}"
    dev = make_clips("dev", *zip(texts, (noise(0.9), noise(0.8), noise(0.7))))
    dev.table["domain"] = ["clinical", "general", ""]
    trainer = make_trainer(tmp_path, (clips[0], dev))
    trainer.decoder.texts = lambda emissions: ["Give 20 mg", "a good good book", "the patient's 1100 books"]
    scores = trainer.evaluate()
    assert np.isfinite(scores["eval_loss"]) and scores["eval_wer"] == pytest.approx(2 / 10)
    assert scores["eval_wer_by_domain/clinical"] == scores["eval_wer_by_domain/general"] == pytest.approx(1 / 3)
    assert scores["eval_cer"] == pytest.approx((1 + 5) / (11 + 11 + 24)) and "eval_wer_by_domain/" not in scores


@pytest.mark.parametrize("flags, half", [([], True), (["--bf16"], False), (["--fp16", "false"], False)])
def test_float16_is_the_default_on_a_gpu(tmp_path, monkeypatch, flags, half):
    """torch and the library are told of a GPU; what they would do with it is left out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda training: setattr(training, "_n_gpu", 1))
    assert script.parse_settings(["--output_dir", str(tmp_path), *flags]).fp16 is half


@pytest.mark.parametrize("flags, half", [([], True), (["--gradient_checkpointing", "true"], False)])
def test_gradients_are_the_same_through_a_guard_and_gradient_checkpointing(tmp_path, clips, flags, half):
    batch, gradients = inputs_of([{"text": "No.", "samples": noise(0.5)}], encoder=label_encoder()), []
    for model in (random_model(), make_trainer(tmp_path, clips, *flags, half=half).model):
        model.train()(**batch).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def overflow_at(trainer, *updates):
    """Let the first encoder layer overflow float16 in the forward passes of these updates."""

    def grow(module, inputs, output):
        if module.training and trainer.state.global_step + 1 in updates:
            return output * torch.tensor(float("inf"), dtype=output.dtype)
        return output

    trainer.model.encoder.layers[0].feed_forward1.linear1.register_forward_hook(grow)


def test_an_overflow_is_skipped_counted_and_leaves_the_running_statistics_finite(tmp_path, clips):
    flags = [*TWO_A_STEP, "--max_steps", 6, "--logging_steps", 1, "--report_to", "tensorboard"]
    trainer = make_trainer(tmp_path, clips, *flags, half=True)
    encoder, kinds, weights, scales = trainer.model.encoder, {}, [], []
    statistics = {name: value for name, value in trainer.model.state_dict().items() if "running_" in name}
    before = {name: value.clone() for name, value in statistics.items()}
    overflow_at(trainer, 2, 3)
    for module in (encoder.subsampler.dense_0, encoder.layers[1].feed_forward1.linear1):
        module.register_forward_hook(lambda module, inputs, output: kinds.update({module: output.dtype}))

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append(trainer.model.ctc_head.weight.detach().clone())
            scales.append(trainer.accelerator.scaler.get_scale())

    trainer.add_callback(Watch)
    trainer.train()
    assert list(kinds.values()) == [torch.float32, torch.float16]
    assert scales == [256, 128, 64, 64, 64, 64]
    counts = [event.value for event in tensorboard(tmp_path / "runs").Scalars("train/skipped_updates")]
    assert counts == [0, 1, 2, 2, 2, 2]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], weights[3])
    assert statistics and all(torch.isfinite(value).all() for value in statistics.values())
    assert any(not torch.equal(value, before[name]) for name, value in statistics.items()), "finite batches move them"
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model(str(tmp_path / "final"))
    saved = AutoModelForCTC.from_pretrained(tmp_path / "final").state_dict()
    assert saved.keys() == random_model().state_dict().keys(), "nothing of the guard is in the saved model"


@pytest.mark.parametrize("half, advice", [(True, "--bf16"), (False, "--learning_rate")])
def test_what_is_not_finite_ends_the_run_with_advice_and_is_never_saved(tmp_path, clips, half, advice):
    flags = [*TWO_A_STEP, *"--max_steps 20 --save_strategy steps --save_steps 1 --learning_rate 1e-3".split()]
    trainer = make_trainer(tmp_path, clips, *flags, "--save_strategy", "no", half=half)
    overflow_at(trainer, 1, 2, 3, *range(5, 40))  # in half precision skipped but for one, then skipped ten times
    with pytest.raises(script.RunError, match=f"at update {14 if half else 1}: .*{advice}"):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())
    with torch.no_grad():
        trainer.model.ctc_head.bias.fill_(float("nan"))
    with pytest.raises(script.RunError, match=rf"dev loss is not finite.*{advice}"):
        trainer.evaluate()
    trainer = make_trainer(tmp_path, clips, *flags, half=half)  # an infinite variance makes no loss infinite
    trainer.model.encoder.layers[0].conv.norm.running_var.fill_(float("inf"))
    with pytest.raises(script.RunError, match=r"not finite, in .*running_var"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*/*"))


def test_one_of_several_gpus_is_used_and_the_way_to_the_others_is_said(tmp_path, clips, monkeypatch, capsys):
    finish = TrainingArguments.__post_init__

    def two_gpus(training):
        finish(training)
        training._n_gpu = 2  # what the library counts where two GPUs are visible to one process

    monkeypatch.setattr(TrainingArguments, "__post_init__", two_gpus)
    trainer = make_trainer(tmp_path, clips, *TWO_A_STEP)
    assert "torchrun --nproc_per_node 2 finetune_medasr.py" in capsys.readouterr().out
    assert trainer._wrap_model(trainer.model) is trainer.model and trainer.args.train_batch_size == 2


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_sharding_that_accelerate_asks_for_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    refused(run_main(tmp_path), 2, f"--{name} is not supported")
    monkeypatch.setenv("RANK", "1")
    done = run_main(tmp_path)
    assert (done.returncode, done.stderr) == (2, ""), "one process says it"


def test_the_dev_evaluation_halves_batches_that_do_not_fit(tmp_path, clips):
    roomy = make_trainer(tmp_path, clips, "--per_device_eval_batch_size", 1).evaluate()
    model, shapes = watched_model(1)
    cramped = make_trainer(tmp_path, clips, model=model).evaluate()
    assert [size for size, _ in shapes] == [3, 1, 2, 1, 1], "clips are scored together where they fit"
    for name in ("eval_loss", "eval_wer", "eval_cer"):
        assert cramped[name] == pytest.approx(roomy[name], rel=1e-4)
    with pytest.raises(script.RunError, match="single clip.*--window_seconds"):
        make_trainer(tmp_path, clips, model=watched_model(0)[0]).evaluate()


@pytest.mark.parametrize("hours, is_long", [(1.5, True), (0.25, False)])
def test_a_cpu_says_how_long_training_will_take(tmp_path, clips, monkeypatch, capsys, hours, is_long):
    """Three updates, of so many hours each, are made, and two more."""
    trainer = make_trainer(tmp_path, clips, *TWO_A_STEP, "--max_steps", 5)
    clock = types.SimpleNamespace(monotonic=lambda: 3600 * hours * trainer.state.global_step)
    monkeypatch.setattr(script, "time", clock)
    trainer.train()
    printed, said = capsys.readouterr().out, "takes 3 h more here; a GPU, --accents or --max_train_samples"
    assert printed.count("training takes") == printed.count(said) == is_long


def test_long_dev_clips_are_scored_in_windows(tmp_path, clips):
    long = make_clips("dev", ("No cough.", noise(14.0, 1)), ("Give 200 mg.", noise(0.7, 6)))
    model, shapes = watched_model(9)
    scores = make_trainer(tmp_path, (clips[0], long), "--window_seconds", 6, model=model).evaluate()
    assert len(shapes) > 1 and max(frames for _, frames in shapes) <= 600
    alone = make_trainer(tmp_path, (clips[0], make_clips("dev", ("Give 200 mg.", noise(0.7, 6))))).evaluate()
    assert scores["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-4), "the loss is that of clips in one piece"


# No time passes, so that speeds are a thousand times the seconds of audio.
TIMELESS = WATCHED + "\nimport types; script.time = types.SimpleNamespace(monotonic=lambda: 1.0)"


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_the_same_batches(demo, tmp_path, warm, run_two):
    """One process takes the batches of both by accumulation: BatchNorm normalises each batch by itself. Its running
    statistics, which training does not read, are those of the first process's batches, and left out here."""
    model = model_with(tmp_path / "model", 0.0, dropout=0.0, activation_dropout=0.0, attention_dropout=0.0)
    flags = f"--model {model} --learning_rate 1e-3 --eval_steps 8 --save_steps 8 --skip_baseline".split()
    one, two = (kills.flags(demo.audio, tmp_path / name, *flags) for name in ("one", "two"))
    both = run_two(*two, *IN_TWO, patch=TIMELESS)
    alone = warm.run(*one, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, patch=TIMELESS)
    drawn = [[{clip for clip, _ in batch} for batch in seen(done)] for done in (*both, alone)]
    updates = [first | second for first, second in zip(*drawn[:2])]
    assert len(updates) == 8 and updates == [drawn[2][at] | drawn[2][at + 1] for at in range(0, 16, 2)]
    epochs = [set().union(*updates[start : start + 4]) for start in (0, 4)]
    assert [len(names) for names in epochs] == [16, 16] and updates[:4] != updates[4:]

    states = [load_json(tmp_path / name / "checkpoint-8/trainer_state.json") for name in ("one", "two")]
    for name in ("loss", "grad_norm", "learning_rate", "padding_percent", "audio_seconds_per_second"):
        first, second = ([entry[name] for entry in state["log_history"] if name in entry] for state in states)
        assert len(first) == 8 and first == pytest.approx(second, rel=1e-4), name
    seconds = 3600 * load_json(tmp_path / "two/results/metrics.json")["data"]["train"]["hours"]
    assert sum(second[:4]) / 1000 == pytest.approx(seconds, abs=0.2), "the last of them: what both have heard"
    before = load_file(model / "model.safetensors")
    one, two = (load_file(tmp_path / name / "checkpoint-8/model.safetensors") for name in ("one", "two"))
    learnt = [name for name in one if "running_" not in name and "num_batches" not in name]
    assert len(learnt) > 20 and not torch.equal(one["ctc_head.weight"], before["ctc_head.weight"])
    for name in learnt:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_two_processes_with_uneven_shares_in_bfloat16_write_everything_once(demo, tmp_path, warm, run_two):
    """Sizes that neither batches nor processes divide, and layers that one process drops and the other does not. The
    texts are those of final/, scored in float32 by one process."""
    model, out = model_with(tmp_path / "model", 0.5), tmp_path / "out"
    flags = """--max_train_samples 17 --max_eval_samples 3 --max_test_samples 25 --max_steps 6 --eval_steps 6
        --save_steps 6 --learning_rate 1e-3 --bf16 --skip_baseline""".split()
    both = run_two(*kills.flags(demo.audio, out, *flags, "--model", model, *IN_TWO))
    said, errors = "".join(done.stdout for done in both), "".join(done.stderr for done in both)
    assert [done.returncode for done in both] == [0, 0], errors
    assert said.count("model: ") == 1 and "Warning" not in errors
    clips = [row["audio_filepath"] for row in scored_clips(out / "results")]
    metrics = load_json(out / "results/metrics.json")
    assert len(clips) == len(set(clips)) == metrics["finetuned"]["clips"] == 25
    assert metrics["baseline"] is metrics["delta"] is None
    curves = [tensorboard(path) for path in (out / "runs").glob("events*")]
    curves = [log.Scalars("train/loss") for log in curves if "train/loss" in log.Tags()["scalars"]]
    assert [[event.step for event in losses] for losses in curves] == [[1, 2, 3, 4, 5, 6]]
    assert len((out / "results/skipped_clips.csv").read_text().splitlines()) > 1
    again = ["--eval_only", "--model", out / "final", "--max_test_samples", 25]
    succeeded(warm.run(*kills.flags(demo.audio, tmp_path / "again", *again)))
    texts = [[row["pred_text"] for row in scored_clips(tmp_path / name / "results")] for name in ("out", "again")]
    assert texts[0] == texts[1]
