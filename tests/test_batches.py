import socket

import numpy as np
import pytest
import torch
from conftest import corpus_audio
from helpers import RATE, label_encoder, make_selection, noise, parse, random_model, small_processor, wav_bytes

import finetune_medasr as script


def collator(**options):
    """Rows -> inputs of the model on the CPU."""
    extractor = small_processor().feature_extractor
    return lambda rows: script.model_inputs(script.CTCCollator(extractor, **options)(rows), extractor, "cpu")


def rows_of(*texts_and_samples):
    return [{"text": text, "samples": samples} for text, samples in texts_and_samples]


def samples_for(logits):
    """The shortest clip that gives so many logits: two convolutions of kernel 5 and stride 2 over frames of 400 samples
    every 160.
    """
    return 400 + 160 * (4 * logits + 8)


def make_trainer(output_dir, train, dev, *flags, model=None):
    args, training = parse(output_dir, *flags)
    dev_set = script.DevSet(dev, small_processor(), label_encoder(), args)
    return script.make_trainer(args, training, model or random_model(), train.clips, dev_set)


def transcribe(model, clips, lengths, args, training):
    selection = script.Selection(clips, [{"num_samples": length} for length in lengths], [])
    emitted = script.emit_clips(model, small_processor(), selection, args, training)[0]
    return [script.clip_text(small_processor(), emissions) for emissions in emitted]


@pytest.fixture(scope="module")
def clips():
    """(train, dev) selections of a few clips of unequal lengths."""
    train = make_selection([("The patient has a fever.", noise(1.5, seed)) for seed in range(2)], "train")
    dev = make_selection(
        [("Give 200 mg.", noise(1.9, 5)), ("No cough.", noise(0.7, 6)), ("A book, 11 letters", noise(1.2, 7))], "dev"
    )
    return train, dev


# ---------------------------------------------------------------- audio


def loudest_frequency(samples):
    return np.argmax(np.abs(np.fft.rfft(samples * np.hanning(len(samples))))) * RATE / len(samples)


@pytest.mark.parametrize("rate, seconds", [(44_100, 1.0), (44_100, 0.777), (8_000, 1.0), (16_000, 1.0), (48_000, 0.5)])
def test_audio_of_any_rate_is_resampled_to_16_khz(rate, seconds):
    time = np.arange(round(seconds * rate)) / rate
    samples = script.decode_audio(wav_bytes(0.5 * np.sin(2 * np.pi * 1000 * time), rate))
    assert samples.dtype == np.float32
    assert abs(len(samples) - len(time) * RATE / rate) <= 1
    assert abs(loudest_frequency(samples) - 1000) <= 2 / seconds
    middle = samples[len(samples) // 4 : -len(samples) // 4]
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.01)


def test_resampling_does_not_fold_high_tones_into_speech():
    time = np.arange(44_100) / 44_100
    samples = script.decode_audio(wav_bytes(0.5 * np.sin(2 * np.pi * 12_000 * time), 44_100))
    assert np.abs(samples[2000:-2000]).max() < 0.001


def test_stereo_is_mixed_down_to_the_mean_of_its_channels():
    left = 0.5 * np.sin(2 * np.pi * 500 * np.arange(RATE) / RATE)
    samples = script.decode_audio(wav_bytes(np.stack([left, np.zeros(RATE)], axis=1)))
    assert samples.shape == (RATE,)
    np.testing.assert_allclose(samples, left / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [16_000, 44_100, 8_000, 48_000, 22_050, 11_025])
@pytest.mark.parametrize("start, stop", [(0, 16_000), (640, 8_000), (16_000, 48_000), (38_400, 99_999)])
def test_a_window_is_what_the_whole_has_there(rate, start, stop):
    time = np.arange(3 * rate) / rate
    data = wav_bytes((0.3 * np.sin(2 * np.pi * (200 + 300 * time) * time)).astype(np.float32), rate)
    whole, window = script.decode_audio(data), script.decode_audio(data, start, stop)
    assert len(window) == min(stop, len(whole)) - start
    np.testing.assert_allclose(window, whole[start:stop], atol=1e-3)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_of_a_long_recording_only_the_window_is_decoded(rate):
    samples = np.full(60 * rate, np.nan, np.float32)  # which decoding refuses
    samples[20 * rate : 40 * rate] = 0.1
    window = script.decode_audio(wav_bytes(samples, rate), 21 * RATE, 39 * RATE)
    assert len(window) == 18 * RATE and np.abs(window[RATE:-RATE] - 0.1).max() < 1e-3


@pytest.mark.parametrize("data", [b"", b"OggS" + bytes(range(256)), wav_bytes(np.full(1000, np.nan))])
def test_audio_that_cannot_be_decoded_is_a_value_error(data):
    with pytest.raises(ValueError):
        script.decode_audio(data)


# ---------------------------------------------------------------- which clips


def test_the_shortest_clip_is_what_the_convolutions_need():
    model, extractor = random_model(), small_processor().feature_extractor
    assert script.shortest_clip(model, extractor) == 2320
    assert model(**collator()(rows_of(("", noise(1)[:2320])))).logits.shape[1] == 1
    with pytest.raises(RuntimeError):
        model(**collator()(rows_of(("", noise(1)[:2319]))))


@pytest.mark.parametrize("samples", [2320, 2960, 16_000, 35_123, 160_000])
def test_counted_logits_are_those_of_the_model(samples):
    model, extractor = random_model(num_hidden_layers=0), small_processor().feature_extractor
    batch = collator()(rows_of(("", noise(10)[:samples])))
    counted = script.logit_lengths(model, torch.tensor([script.input_length(extractor, samples)]))
    assert counted.tolist() == [model(**batch).logits.shape[1]]


def clip_check(max_train_seconds):
    return script.ClipCheck(
        random_model(num_hidden_layers=0), small_processor().feature_extractor, label_encoder(), max_train_seconds
    )


@pytest.mark.parametrize(
    "split, text, samples, reason",
    [
        ("train", "no", 2319, "too short: 0.14 s, the model needs 0.145 s"),
        ("train", "yes yes", 2320, "more labels than frames"),
        ("train", "", 2320, "empty text"),
        ("train", " \n\t\u00a0", 16_000, "empty text"),
        ("dev", "", 16_000, "empty text"),
        ("test", " ", 16_000, "empty text"),
        ("train", "日本", 16_000, "no text left that the tokenizer covers"),
        ("train", "no", 4 * RATE + 1, "over --max_train_seconds: 4.0 s"),
        ("train", "no", 4 * RATE, ""),
        ("train", "yes " * 200, 3 * RATE, "more labels than frames"),
        ("dev", "no", 2319, ""),
        ("test", "no", 1, ""),
        ("dev", "no", 400 * RATE, ""),
        ("test", "no", 400 * RATE, ""),
        ("test", "yes " * 200, 3 * RATE, ""),
        ("test", "日本", 16_000, ""),
    ],
)
def test_reasons_against_a_clip(split, text, samples, reason):
    found = clip_check(4.0)([{"split": split, "text": text, "num_samples": samples, "problem": ""}])[0]
    assert found == reason or reason == "more labels than frames" == found.split(":")[0]


def test_a_limit_that_is_no_round_number_of_frames_is_no_index_error():
    assert clip_check(4.015)([{"split": "train", "text": "no", "num_samples": 64_240, "problem": ""}]) == [""]


@pytest.mark.parametrize("text", ["5z5z5", "5zz55", "555555", "200 mg too good"])
def test_a_clip_is_left_out_exactly_where_its_ctc_loss_is_infinite(text):
    check, encoder = clip_check(30.0), label_encoder()
    labels = torch.tensor(encoder([text])[0])
    verdicts = []
    for logits in range(1, 3 * len(labels)):
        scores = torch.zeros(logits, 1, encoder.vocab_size).log_softmax(-1)
        loss = torch.nn.functional.ctc_loss(scores, labels[None], torch.tensor([logits]), torch.tensor([len(labels)]))
        row = {"split": "train", "text": text, "num_samples": samples_for(logits), "problem": ""}
        usable = check([row]) == [""]
        assert usable == bool(torch.isfinite(loss)), (text, logits)
        verdicts.append(usable)
    assert {True, False} == set(verdicts)


# ---------------------------------------------------------------- batches


def test_a_batch_with_its_attention_mask_runs_through_the_model():
    batch = collator(encoder=label_encoder())(rows_of(("A fever.", noise(1.5)), ("No.", noise(0.8))))
    assert batch["attention_mask"].sum(-1).tolist() == [148, 78]  # 1 + (samples - 400) // 160
    output = random_model()(**batch)
    assert torch.isfinite(output.loss) and output.loss > 0
    assert output.logits.shape[:2] == (2, 34)


def test_labels_are_padded_with_the_ignored_label():
    encoder = label_encoder()
    batch = collator(encoder=encoder)(rows_of(("200 mg too good", noise(1)), ("No.", noise(1))))
    long, short = encoder(["200 mg too good", "No."])
    assert batch["labels"].tolist() == [long, short + [-100] * (len(long) - len(short))]


def test_the_loss_of_a_batch_is_the_mean_over_its_clips_alone():
    model, encoder = random_model(), label_encoder()
    clips = [("The patient has a fever.", noise(2.5, 1)), ("No.", noise(0.9, 2))]
    together = model(**collator(encoder=encoder)(rows_of(*clips))).loss
    alone = [model(**collator(encoder=encoder)(rows_of(clip))).loss for clip in clips]
    assert together.item() == pytest.approx(sum(alone).item() / 2, rel=1e-4)


def test_padding_sounds_like_silence():
    short = noise(0.5)
    batch = collator()(rows_of(("", noise(1.5)), ("", short)))
    beyond = batch["input_features"][1, -(-len(short) // 160) :]
    assert len(beyond) > 90
    torch.testing.assert_close(beyond, torch.full_like(beyond, float(np.log(1e-5))))


def test_clips_below_the_shortest_are_padded_with_silence():
    batch = collator(shortest=2320)(rows_of(("", noise(1)[:100])))
    assert batch["input_features"].shape == (1, 13, 128) and batch["attention_mask"].all()


def test_padding_never_changes_the_text_of_a_clip(tmp_path):
    model = random_model()
    sounds = [noise(0.9, 1), noise(4.0, 2), noise(0.6, 3), noise(2.2, 4)]
    clips = [{"audio": wav_bytes(samples)} for samples in sounds]
    lengths = [len(samples) for samples in sounds]
    texts = {}
    for size in (1, 4):
        args, training = parse(tmp_path, "--per_device_eval_batch_size", size)
        texts[size] = transcribe(model, clips, lengths, args, training)
    assert texts[1] == texts[4]
    assert all(len(text) > 5 for text in texts[1]) and len(set(texts[1])) == 4


@pytest.mark.parametrize(
    "ids, text",
    [
        ([0, 5, 5, 0, 5, 6, 6, 0, 0], [5, 5, 6]),
        ([5, 5, 5], [5]),
        ([0, 0, 0], []),
        ([5, 0, 2, 0, 1, 6], [5, 6]),  # no </s>, no <s>
    ],
)
def test_frame_ids_are_collapsed_to_text(ids, text):
    tokenizer = small_processor().tokenizer
    assert script.decode_ids(small_processor(), ids) == tokenizer.decode(text, group_tokens=False)


# ---------------------------------------------------------------- log-mels


SOUNDS = {
    "speech": lambda: script.decode_audio(next(iter(corpus_audio("test").values()))),
    "silence": lambda: np.zeros(RATE, np.float32),
    "noise": lambda: np.random.default_rng(0).normal(scale=0.1, size=2 * RATE).astype(np.float32),
    "quiet noise": lambda: np.random.default_rng(0).normal(scale=1e-4, size=RATE).astype(np.float32),
    "clipped": lambda: np.clip(50 * noise(3), -1, 1),
    "tone": lambda: np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32),
    "constant": lambda: np.ones(RATE, np.float32),
}


@pytest.mark.parametrize("names", [[name] for name in SOUNDS] + [list(SOUNDS)])
def test_log_mels_are_those_of_the_extractor(names):
    extractor, sounds = small_processor().feature_extractor, [SOUNDS[name]() for name in names]
    options = dict(sampling_rate=RATE, padding="longest", return_attention_mask=True, return_tensors="pt")
    expected, found = extractor(sounds, **options), collator()(rows_of(*(("", sound) for sound in sounds)))
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    assert found["input_features"].dtype == torch.float32
    torch.testing.assert_close(found["input_features"], expected["input_features"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("settings", [{"padding_value": 0.5}, {"padding_side": "left"}, {"preemphasis": 0.97}])
def test_an_extractor_with_other_settings_is_called_itself(settings):
    from transformers import LasrFeatureExtractor

    plain, other = LasrFeatureExtractor(), LasrFeatureExtractor(**settings)
    assert script.knows_log_mels(plain) and not script.knows_log_mels(other)
    rows = rows_of(("", noise(1)), ("", noise(2)))
    batch = script.CTCCollator(other)(rows)
    options = dict(sampling_rate=RATE, padding="longest", return_attention_mask=True, return_tensors="pt")
    expected = other([row["samples"] for row in rows], **options)
    assert torch.equal(script.model_inputs(batch, other, "cpu")["input_features"], expected["input_features"])


# ---------------------------------------------------------------- SpecAugment


def masked_rows(*seconds, seed):
    """(log-mels as they are, the same with SpecAugment's masks, lengths in frames) of clips of noise."""
    hiss = np.random.default_rng(0).normal(scale=0.1, size=10 * RATE).astype(np.float32)  # nowhere silent
    rows = [{"text": "", "samples": hiss[: round(s * RATE)], "clip": f"clip-{n}"} for n, s in enumerate(seconds)]
    plain, masked = collator()(rows), collator(augment=True, seed=seed)(rows)
    # The narrowest of the lowest mel filters lie between two frequencies of the transform, and hear nothing.
    bins = (plain["input_features"][0] > np.log(1e-5) + 1).any(0)
    return plain["input_features"][..., bins], masked["input_features"][..., bins], plain["attention_mask"].sum(-1)


@pytest.mark.parametrize("seed", range(5))
def test_spec_augment_masks_bands_and_stretches_with_silence_inside_the_clip(seed):
    silence = torch.tensor(np.log(1e-5), dtype=torch.float32)
    for plain, clip, length in zip(*masked_rows(10.0, 2.53, 0.42, 0.15, seed=seed)):
        assert torch.equal(plain[length:], clip[length:])
        masked = clip[:length] != plain[:length]
        torch.testing.assert_close(clip[:length][masked], silence.expand(int(masked.sum())))
        bins, frames = masked.all(0), masked.all(1)
        assert (masked == (bins[None] | frames[:, None])).all()  # whole bands and whole stretches
        assert bins.sum() <= 2 * 20
        assert frames.sum() <= min(30, length // 5) * -(-length // 250)


def test_spec_augment_masks_something_of_both_kinds_as_a_rule():
    plain, clips, _ = masked_rows(*[5.0] * 20, seed=1)
    masked = plain != clips
    assert masked.all(1).any(1).float().mean() > 0.8 and masked.all(2).any(1).float().mean() > 0.8
    assert 0.05 < masked.float().mean() < 0.5


def test_masks_depend_on_seed_epoch_and_clip_alone():
    row = {"text": "", "samples": noise(5), "clip": "a"}
    others = [{**row, "clip": "b"}, {**row, "samples": noise(6), "clip": "c"}]

    def masks(rows, **options):
        return collator(augment=True, **options)(rows)["input_features"][0, : len(frames)]

    frames = collator()([row])["input_features"][0]
    first = masks([row], seed=1, epoch=2)
    assert torch.equal(first, masks([row, *others], seed=1, epoch=2))
    assert not torch.equal(first, masks([row], seed=1, epoch=3))
    assert not torch.equal(first, masks([row], seed=2, epoch=2))


@pytest.mark.parametrize("flags, altered", [([], True), (["--no_spec_augment"], False)])
def test_the_trainer_augments_its_training_batches_unless_told_not_to(tmp_path, clips, flags, altered):
    train, dev = clips
    trainer = make_trainer(tmp_path, train, dev, *flags)
    rows, extractor = [train.clips[0], train.clips[1]], small_processor().feature_extractor
    plain = collator(encoder=label_encoder())(rows)["input_features"]
    trained_on = script.model_inputs(trainer.data_collator(rows), extractor, "cpu")["input_features"]
    assert torch.equal(plain, trained_on) != altered


def test_dev_clips_are_never_augmented(tmp_path, clips):
    train, dev = clips
    augmented, plain = (make_trainer(tmp_path, train, dev, *flags) for flags in ([], ["--no_spec_augment"]))
    assert augmented.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"] > 0


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("samples", [1, 2000, 10_000, 10_001, 14_000, 16_000, 16_001, 25_999, 100_003])
@pytest.mark.parametrize("overlap", [2000, 1000])
def test_windows_tile_a_clip(samples, overlap):
    window = 10_000
    spans = script.window_spans(samples, window, overlap)
    covered = np.zeros(samples, int)
    for number, (start, stop) in enumerate(spans):
        assert 0 <= start < stop <= samples and stop - start <= window
        covered[0 if number == 0 else start + overlap : samples if number == len(spans) - 1 else stop - overlap] += 1
    assert (covered == 1).all()
    assert len(spans) == 1 or samples > window


@pytest.mark.parametrize("seconds", [6.0, 6.01, 9.5, 17.3])
def test_a_clip_in_windows_reads_like_the_clip_in_one_piece(tmp_path, seconds):
    # Without encoder layers a logit hears 0.2 s around it, so windows and the whole must agree on each one.
    model, sound = random_model(num_hidden_layers=0), noise(seconds, 3)
    texts = []
    for window in (6, 60):
        args, training = parse(tmp_path, "--window_seconds", window, "--per_device_eval_batch_size", 2)
        texts += transcribe(model, [{"audio": wav_bytes(sound)}], [len(sound)], args, training)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 10 * seconds


def test_texts_come_back_in_the_order_of_the_clips(tmp_path):
    model = random_model(num_hidden_layers=0)
    sounds = [noise(0.5, 1), noise(8.0, 2), noise(0.01, 3), noise(7.0, 4), noise(1.0, 5)]
    clips, lengths = [{"audio": wav_bytes(samples)} for samples in sounds], [len(samples) for samples in sounds]
    args, training = parse(tmp_path, "--window_seconds", 6, "--per_device_eval_batch_size", 3)
    together = transcribe(model, clips, lengths, args, training)
    alone = [transcribe(model, [clip], [length], args, training)[0] for clip, length in zip(clips, lengths)]
    assert together == alone
    assert len(set(together)) == 5


# ---------------------------------------------------------------- half precision


def overflowing_model(part):
    """A LASR one of whose parts passes float16's 65,504, as MedASR's subsampler does; its outputs are ordinary."""
    model = random_model()
    with torch.no_grad():
        if part == "subsampler":
            model.encoder.subsampler.dense_1.weight *= 3e6
        else:
            feed_forward = model.encoder.layers[1].feed_forward1
            feed_forward.linear1.weight *= 1e7
            feed_forward.linear2.weight *= 1e-7
    return model


@pytest.mark.parametrize(
    "part, guarded_module",
    [
        ("subsampler", "encoder.subsampler"),
        ("feed_forward", "encoder.layers.1.feed_forward1.linear1"),
    ],
)
def test_guarded_model_stays_finite_where_plain_float16_overflows(part, guarded_module):
    model = overflowing_model(part)
    batch = collator(encoder=label_encoder())(rows_of(("No.", noise(0.4)), ("A", noise(0.3))))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        expected = model(**batch).logits
        assert script.activation_peaks(model, [inputs])[guarded_module] > 65_504
        with torch.autocast("cpu", torch.float16):
            assert not torch.isfinite(model(**batch).logits).all()

    guarded = script.guard_half_precision(model, [inputs], "cpu")
    assert guarded[guarded_module] > 65_504
    # Only what needs it is in float32: float16 has to stay worth its while.
    assert "encoder.layers.0.self_attn.q_proj" not in guarded and "ctc_head" not in " ".join(guarded)

    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        logits = model(**batch).logits.float()
    assert float((logits - expected).abs().max()) < 0.05 * float(expected.std())

    model.train()
    with torch.autocast("cpu", torch.float16):
        loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    assert model.encoder.subsampler.dense_1.weight.grad.abs().max() > 0


def test_a_model_that_is_not_finite_even_when_guarded_is_refused():
    model = random_model()
    with torch.no_grad():
        model.ctc_head.weight *= float("nan")
    with pytest.raises(script.RunError, match="--bf16"):
        script.guard_half_precision(model, [collator()(rows_of(("", noise(1))))], "cpu")


# ---------------------------------------------------------------- the Trainer


def without_batch_statistics(model):
    """The model, whose BatchNorms stay in eval mode: their statistics are those of a batch, however it is split."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.train = lambda mode=True, module=module: module
    return model


@pytest.mark.parametrize(
    "flags, split",
    [
        ([], (8, 4)),
        (["--gradient_accumulation_steps", "1"], (8, 1)),
        (["--per_device_train_batch_size", "3"], (3, 4)),
    ],
)
def test_without_a_gpu_auto_is_eight_clips_a_step_and_a_number_is_that_number(tmp_path, clips, flags, split):
    trainer = make_trainer(tmp_path, *clips, *flags)
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == split
    assert trainer._train_batch_size == split[0]


@pytest.mark.parametrize("clips", [8, 5])
def test_the_loss_and_gradient_of_an_update_do_not_depend_on_its_steps(tmp_path, clips):
    """Also where the last step has fewer clips than the others."""
    sounds = [(f"Patient {number} has a fever.", noise(1 + 0.4 * number, number)) for number in range(clips)]
    train, logged = make_selection(sounds, "train"), []
    for size, steps in ((8, 1), (4, 2), (2, 4), (1, 8)):
        split = f"--per_device_train_batch_size {size} --gradient_accumulation_steps {steps}"
        flags = f"--no_spec_augment --max_steps 1 --logging_steps 1 {split}".split()
        model = without_batch_statistics(random_model())
        trainer = make_trainer(tmp_path / str(size), train, train, *flags, model=model)
        trainer.train()
        logs = next(logs for logs in trainer.state.log_history if "grad_norm" in logs)
        logged.append((logs["loss"], logs["grad_norm"]))
    assert min(logged[0]) > 0.1
    for loss, norm in logged[1:]:
        assert loss == pytest.approx(logged[0][0], rel=1e-4) and norm == pytest.approx(logged[0][1], rel=1e-3)


def test_checkpoints_and_saved_models_hold_the_whole_processor(tmp_path, clips):
    from transformers import AutoModelForCTC, AutoProcessor

    train, dev = clips
    trainer = make_trainer(
        tmp_path, train, dev, "--max_steps", 1, "--save_strategy", "steps", "--save_steps", 1, "--logging_steps", 1
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-1", tmp_path / "final"):
        processor = AutoProcessor.from_pretrained(folder)
        assert processor.tokenizer("200 mg").input_ids == small_processor().tokenizer("200 mg").input_ids
        assert processor.feature_extractor.to_dict() == small_processor().feature_extractor.to_dict()
    saved = AutoModelForCTC.from_pretrained(tmp_path / "final").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_scores_the_texts_of_the_clips_themselves(tmp_path, clips, batch_size):
    train, dev = clips
    args, training = parse(tmp_path)
    texts = transcribe(random_model(), dev.clips, [row["num_samples"] for row in dev.rows], args, training)
    metrics = make_trainer(tmp_path, train, dev, "--per_device_eval_batch_size", batch_size).evaluate()
    scores = script.score_texts(dev.rows, texts, None).scores
    assert metrics["eval_wer"] == pytest.approx(scores["wer"])
    assert metrics["eval_cer"] == pytest.approx(scores["cer"])
    assert metrics["eval_wer_by_domain/clinical"] == pytest.approx(scores["wer"])
    assert np.isfinite(metrics["eval_loss"])


def dev_set(*texts_and_domains):
    rows = [{"text": text, "domain": domain, "accent": "igbo"} for text, domain in texts_and_domains]
    return script.DevSet(script.Selection(None, rows, []), small_processor(), label_encoder(), None)


def heard(text):
    """What a perfect model's frames read as: each label twice, then a blank."""
    return script.decode_ids(
        small_processor(), [id for label in label_encoder()([text])[0] for id in (label, label, 0)]
    )


def test_doubled_letters_and_digits_survive_the_dev_scores():
    texts = ["200 mg", "too good", "11", "THE PATIENT’S 1100 books {period}"]
    dev = dev_set(*((text, "clinical") for text in texts))
    rates = dev.rates([heard(text) for text in texts])
    assert rates["wer"] == 0 and rates["cer"] == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in dev.samples.splitlines()]
    assert ["igbo", "200 mg", "200 mg"] in rows and ["igbo", "too good", "too good"] in rows


def test_dev_scores_count_the_errors_of_each_domain():
    rates = dev_set(("Give 200 mg.", "clinical"), ("a good book", "general")).rates(["Give 20 mg", "a good good book"])
    assert rates["wer"] == pytest.approx(2 / 6)
    assert rates["wer_by_domain/clinical"] == pytest.approx(1 / 3)
    assert rates["wer_by_domain/general"] == pytest.approx(1 / 3)
    assert rates["cer"] == pytest.approx((1 + 5) / (11 + 11))


def test_the_metric_needs_no_network(monkeypatch):
    def refused(*_):
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    script.error_rates_metric.cache_clear()
    metrics = script.error_rates_metric().compute(predictions=["a c", "d"], references=["a b", "d"])
    assert metrics == {"wer": pytest.approx(1 / 3), "cer": pytest.approx(1 / 4)}
    script.error_rates_metric.cache_clear()


@pytest.mark.parametrize("flags, layerdrop", [(["--gradient_checkpointing"], 0.0), ([], 0.1)])
def test_gradient_checkpointing_switches_layerdrop_off(tmp_path, clips, flags, layerdrop):
    train, dev = clips
    model = random_model(layerdrop=0.1)
    make_trainer(tmp_path, train, dev, *flags, model=model)
    assert model.encoder.layerdrop == layerdrop


def test_training_batches_are_grouped_by_length_without_decoding_audio(tmp_path, clips):
    from datasets import Dataset

    lengths = [int(length) for length in np.random.default_rng(0).integers(RATE, 20 * RATE, 160)]
    empty = dict.fromkeys(script.clip_features(), "")
    rows = [{**empty, "audio": b"not audio", "num_samples": length, "split": "train"} for length in lengths]
    train = Dataset.from_list(rows, features=script.clip_features())
    args, training = parse(tmp_path, "--per_device_train_batch_size", 4)
    dev_set = script.DevSet(clips[1], small_processor(), label_encoder(), args)
    trainer = script.make_trainer(args, training, random_model(), train, dev_set)
    order = list(trainer._get_train_sampler(train))
    assert sorted(order) == list(range(160))
    batches = [[lengths[index] for index in order[start : start + 4]] for start in range(0, 160, 4)]
    padding = 1 - sum(lengths) / sum(4 * max(batch) for batch in batches)
    assert padding < 0.15  # 0.37 in a random order
    assert [max(batch) for batch in batches] != sorted((max(batch) for batch in batches), reverse=True)
