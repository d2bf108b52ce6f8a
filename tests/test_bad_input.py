"""Bad input of each kind through the command line: exit status, message, and what is used of it all the same."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import kills
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import CORPUS, MODEL, load_json, refused, scored_clips, succeeded
from helpers import GOOD, TEXT, modified, rows_in, run_main, skipped, sound, tar, write, write_part
from safetensors.torch import load, save

BOUNDS = """max_train_samples=-3 max_eval_samples=0 max_train_seconds=nan num_proc=0 learning_rate=0 learning_rate=inf
    learning_rate=-1e-05 num_train_epochs=0 max_steps=0 max_steps=-7 warmup_steps=nan weight_decay=nan max_grad_norm=inf
    per_device_train_batch_size=0 gradient_accumulation_steps=0 eval_steps=0 save_total_limit=-1 window_seconds=1
    early_stopping_patience=-1 dataloader_num_workers=-1 seed=-1 seed=4294967296 metric_for_best_model=foo
    remove_unused_columns=True label_smoothing_factor=0.1
    auto_find_batch_size=True dataloader_drop_last=True""".split()
SMALL, ALSO = f"--model {MODEL} --dataset {CORPUS}", f"--model {MODEL} --dataset {CORPUS} --accents zulu --also_score"
FLAGS = [  # (flags, what the message says)
    *((f"--{bound}", f"--{bound.replace('=', ' is ')}") for bound in BOUNDS),
    ("--max_train_samples many", "--max_train_samples.*'many'"),
    ("--learning_rate", "--learning_rate"),
    ("--logging_steps 0.5", "--logging_steps.*'0.5'"),
    ("--save_steps 300 --eval_steps 200", "300.*multiple.*200"),
    ("--target_text spoken", "'spoken'.*as_written.*words"),
    ("--report_to foo", "foo is not supported.*tensorboard"),
    ("--accelerator_config foo", "foo"),
    ("--deepspeed foo.json", "deepspeed"),
    ("--lr_scheduler_type foo", "--lr_scheduler_type.*'foo'"),
    ("--use_cpu perhaps", "--use_cpu"),
    ("--fp16 --bf16", "fp16"),
    ("--streaming", "--streaming needs --max_steps"),
    ("--streaming --max_steps 2 --max_train_samples 3", "--max_train_samples.*--streaming"),
    ("--dry_run --prepare_only", "--prepare_only and --dry_run"),
    ("--eval_only --transcribe visit.wav", "--eval_only and --transcribe"),
    ("--learnin_rate 3", "--learnin_rate.*--learning_rate"),
    ("--output_dir=", "--output_dir is ''"),
    ("--output_dir file", "--output_dir is .*file is no folder"),
    ("--data_dir file/below", "--data_dir is .*file is no folder"),
    ("--output_dir . --data_dir results/audio", "--data_dir .* replaces"),
    ("--output_dir . --model final --overwrite_output_dir", "--model .*deletes"),
    ("--output_dir . --dataset runs --overwrite_output_dir", "--dataset .*deletes"),
    ("--output_dir . --resume_from_checkpoint checkpoint-7 --overwrite_output_dir", "--resume_from.*deletes"),
    ("nowhere.yaml", "nowhere.yaml"),
    (".", "YAML.*Is a directory"),
    ("--transcribe nowhere.wav", "nowhere.wav.*no such file"),
    ("--transcribe *.ogg", r"\*.ogg.*no such file"),
    ("--transcribe runs", "runs.*no audio file"),
    ("--transcribe bin", "bin.*no audio file"),
    ("--transcribe visit.wav --transcript_format docx", "docx.*text.*json.*srt.*vtt"),
    ("--transcribe visit.wav b/visit.wav --transcript_format srt", "srt.*--transcript_dir"),
    ("--transcribe visit.wav b/visit.wav --transcript_dir out", "visit.wav and b/visit.wav"),
    ("--transcribe visit.wav --transcript_dir file", "--transcript_dir.*file"),
    *((flag, f"{flag.split()[0]} needs --transcribe") for flag in ("--transcript_format srt", "--transcript_dir x")),
    ("--format_dictation", "--format_dictation needs --transcribe"),
    ("--lm nowhere.arpa --eval_only", "--lm is nowhere.arpa"),
    ("--tune_lm", "--tune_lm needs --lm"),
    ("--lm auto --tune_lm --transcribe visit.wav", "--tune_lm and --transcribe"),
    ("--lm auto --score_file file", "--lm and --score_file"),
    ("--lm auto --lm_weight -1", "--lm_weight is -1"),
    ("--lm auto --lm_word_score inf", "--lm_word_score is inf"),
    ("--lm auto --lm_beam 0", "--lm_beam is 0"),
    (f"{ALSO} a/b a/b", "--also_score has a.b"),
    (f"{ALSO} us/en us_en", "--also_score has us.en"),
    (f"{ALSO} _Test", "--also_score has test"),
    (f"{ALSO} a/b --transcribe visit.wav", "--also_score and --transcribe"),
    (f"{SMALL} --accents igbo yorub", "--accents has 'yorub'.*did you mean yoruba"),
    (f"{SMALL} --accents xhosa", "--accents has 'xhosa'.*they are akan-fante, damara, igbo"),
    (f"{SMALL} --domains clinicl", "--domains has 'clinicl'.*did you mean clinical"),
    (f"{SMALL} --countries XX", "--countries has 'XX'.*GH.*KE.*NA.*NG.*ZA"),
    (f"{SMALL} --accents zulu --domains general --countries KE ZA NA", "--countries has 'KE'"),
]
YAML = {  # name: (content, what the message says)
    "broken": (b"accents: [yoruba,\nseed: }", "broken.yaml"),
    "list": (b"- seed\n- 7\n", "list.yaml .*YAML"),
    "text": (b"just words", "text.yaml .*YAML"),
    "typo": (b"learnin_rate: 1e-5\n", "learnin_rate.*--learning_rate"),
    "nested": (b"training:\n  seed: 7\n", "training"),
    "binary": (b"\xff\xfe\0\x80", "binary.yaml .*YAML"),
    "python": (b"seed: !!python/object/apply:os.system ['touch ran']\n", "python.yaml .*YAML"),
}
FLAGS += [(f"{name}.yaml", message) for name, (_, message) in YAML.items()]
LOGGERS = [name for name in "wandb comet_ml mlflow neptune trackio clearml".split() if not find_spec(name)]
FLAGS += [(f"--report_to {name}", f"requires.*pip install {name[:5]}") for name in LOGGERS]
NOT_THERE = [(f"{ALSO} ./nowhere", "./nowhere"), (f"{ALSO} {MODEL}", "model"),
             (f"{SMALL} --transcribe visit.wav --transcript_dir /proc/texts", "/proc")]  # fmt: skip
CASES = [(*case, 2) for case in FLAGS] + [(*case, 1) for case in NOT_THERE]


@pytest.mark.parametrize("flags, message, status", CASES, ids=[flags for flags, *_ in CASES])
def test_flags_that_cannot_work_are_refused_before_anything_is_written(tmp_path, flags, message, status):
    for folder in ("final", "runs", "checkpoint-7"):
        (tmp_path / folder).mkdir()
    files = {"file": "not a folder", "visit.wav": GOOD, "b/visit.wav": GOOD, "bin/.Trash-1000/visit.wav": GOOD}
    for name, content in (files | {f"{name}.yaml": content for name, (content, _) in YAML.items()}).items():
        write(tmp_path / name, content)
    before = modified(tmp_path)
    done = run_main(tmp_path, *flags.split())
    refused(done, status, message)
    assert modified(tmp_path) == before and (done.stdout == "" or "--dataset" in flags)


ROW = '{"text": "No fever.", "pred_text": "no fever"}\n'
NO_PRED = '{"text": "a"}\n'
SCORE_FILES = [  # (name, content, exit status, what is said)
    ("nowhere.csv", None, 2, "--score_file .*nowhere.csv"),
    ("x.jsonl", "not JSON\n", 2, "not lines of JSON"),
    ("x.jsonl", "[1, 2]\n", 2, "row 1 is not an object"),
    ("x.jsonl", "", 2, "no column"),
    ("x.jsonl", b"\xff\xfe\1", 2, "--score_file"),
    ("x.jsonl", '{"text": "...", "pred_text": "a"}\n', 2, "no text with a word"),
    ("x.csv", "reference,hypothesis\na,b\n", 2, "no column text.*its columns are reference, hypothesis"),
    ("x.csv", "text,hypothesis\na,b\n", 2, "no column pred_text"),
    ("x.csv", "", 2, "no column text.*its columns are none"),
    ("x.jsonl", ROW + '{"text": "a", "pred_text": "a", "duration": 1e306}', 0, "2 rows without a duration"),
    ("x.jsonl", ROW + '{"text": "a\\ud800 שלום 😀", "pred_text": "a"}', 0, "2 rows without a duration"),
    ("x.jsonl", ROW + '{"text": "", "pred_text": "a"}', 0, r"1 row left out: no text, such as row 2\."),
    ("x.jsonl", ROW + '{"text": null, "pred_text": " "}\n' * 500 + NO_PRED * 500, 0, "500 rows .* such as row 502"),
    ("x.csv", "text;pred_text;speaker\na;b;c\n" + " ;;\n" * 500, 0, "1 row without a duration"),
    ("x.jsonl", ROW + '{"text": "a", "pred_text": "a", "baseline_text": "b"}', 0, "no comparison is made"),
    ("x.TSV", "text\tpred_text\r\na\tb\r\n", 0, "1 row without a duration"),
    ("x.csv", "text;pred_text\na\nc;d\n", 0, "1 row left out: no pred_text, such as row 1"),
    ("x.csv", "text,pred_text\nfever, cough,fever\nc,d,\n", 0, "1 row left out: more cells than columns, such"),
    ("x.csv", 'text,pred_text\nc,d\n"a,b\n', 0, "an unclosed quote"),
    ("x.csv", b"text,pred_text\ncaf\xe9\0,b\n" + b"a " * 100_000 + b",b\n", 0, "it is not UTF-8"),
]


@pytest.mark.parametrize("name, content, status, message", SCORE_FILES, ids=range(len(SCORE_FILES)))
def test_score_files(tmp_path, name, content, status, message):
    if content is not None:
        write(tmp_path / name, content)
    done = run_main(tmp_path, "--score_file", name, "--output_dir", "out")
    if status:
        refused(done, status, message)
        assert not (tmp_path / "out").exists()
        return
    assert re.search(message, succeeded(done).stderr), done.stderr
    scored = load_json(tmp_path / "out/results/metrics.json")["data"]["test"]
    left_out = map(int, re.findall(r"warning: (\d+) rows? left out: ", done.stderr))
    assert scored["left_out"] == sum(left_out) and scored["hours"] == 0 and done.stderr.count("warning: ") < 5
    assert scored["clips"] == len(scored_clips(tmp_path / "out/results"))


HEADER = "user_ids,accent,transcript,audio_paths,duration,domain,country,split"
BOTH = ["first", "second"]


def member(name):
    return f"data/data/intron/{name}.wav"


def csv_row(name, text=f'"{TEXT}"', split="train"):
    return f"someone,{name.split('/')[0]},{text},{name}.wav,3,clinical,NG,{split}\n"


def rows_of(folder, names=BOTH, split="train"):
    return HEADER + "\n" + "".join(csv_row(f"{folder}/{name}", split=split) for name in names)


def two(folder, *more):
    """Members of an archive: two good clips, the others between them."""
    return [(member(f"{folder}/first"), GOOD), *more, (member(f"{folder}/second"), GOOD)]


def ten(folder):
    """An archive of ten clips that gzip cannot make small, so that damage in the middle falls between clips."""
    noise = np.random.default_rng(0)
    return tar([(member(f"{folder}/{name}"), sound(noise.uniform(-0.5, 0.5, 8_000))) for name in TEN])


DAMAGED, TEN = "^damaged archive", list("0123456789")
CUT, CORRUPT, CHECKSUM = map(ten, ("cut", "corrupt", "checksum"))
HALF = len(CUT) // 2
ARCHIVES = {  # accent: (archive, clips used, {clip or archive: why it is left out})
    "climbs": (tar(two("climbs", ("../../../outside/climbs.wav", GOOD))), BOTH, {"outside/climbs.wav": "climbs out"}),
    "absolute": (tar(two("absolute", ("/tmp/outside/absolute.wav", GOOD))), BOTH, {"outside/absolute": "climbs out"}),
    "symlink": (tar(two("symlink", (member("symlink/x"), "2"))), BOTH, {"symlink/x.wav": "link or a device"}),
    "device": (tar(two("device", (member("device/x"), "3"))), BOTH, {"device/x.wav": "link or a device"}),
    "nested": (tar(two("nested", ("data/inner.tar.gz", tar([])))), BOTH, {"data/inner.tar.gz": "no transcript"}),
    "folders": (tar(two("folders", ("data/data", "5"))), BOTH, {}),
    "twice": (tar(two("twice", (member("twice/first"), GOOD))), BOTH, {"twice/first.wav": "a second copy"}),
    "no-members": (tar([]), [], {"no-members/first.wav": "no audio", "no-members/second.wav": "no audio"}),
    "nothing": (b"", [], {"train_nothing_0": DAMAGED, "nothing/first.wav": "no audio"}),
    "html-page": (b"<html>Service unavailable</html>", [], {"train_html-page_0": DAMAGED}),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", [], {"train_lfs_0": DAMAGED + ".*git lfs pull"}),
    "cut": (CUT[:HALF], TEN[:4], {"train_cut_0": DAMAGED + ".*4 clips", "cut/9.wav": "no audio"}),
    "corrupt": (CORRUPT[:HALF] + bytes(100) + CORRUPT[HALF + 100 :], TEN[:5],
                {"train_corrupt_0": DAMAGED + ".*5 clips", "corrupt/9.wav": "no audio"}),
    "checksum": (CHECKSUM[:-8] + bytes(4) + CHECKSUM[-4:], TEN, {"train_checksum_0": DAMAGED}),
}  # fmt: skip


def bare(name, quote=""):
    """A table whose first text has no quotes but an opening one that nothing closes."""
    return rows_of(name).replace(f'"{TEXT}"', quote + "text", 1)


SWALLOWED = f"{TEXT},unclosed/first.wav,3,clinical,NG,train\nsomeone,unclosed,{TEXT}"
TABLES = {  # name: (CSV, the texts of its two clips, None of one that has no transcript, what is warned of)
    "crlf": (rows_of("crlf").replace("\n", "\r\n"), TEXT, TEXT, ""),
    "bom": ("\ufeff" + rows_of("bom"), TEXT, TEXT, ""),
    "utf-16": (rows_of("utf-16").replace(TEXT, "café", 1).encode("utf-16"), "café", TEXT, ""),
    "latin-1": (rows_of("latin-1").replace(TEXT, "café", 1).encode("latin-1"), "café", TEXT, "it is not UTF-8"),
    "semicolons": (bare("semicolons").replace(",", ";"), "text", TEXT, ""),
    "names": (rows_of("names").replace("transcript", "Sentence").replace("audio_paths", "file_name"), TEXT, TEXT, ""),
    "more-columns": (re.sub(r"(?m)$(?=\n)", ",more", rows_of("more-columns")), TEXT, TEXT, ""),
    "short-row": (re.sub(r",3,clinical.*\n$", "\n", rows_of("short-row")), TEXT, TEXT, ""),
    "blank-lines": (rows_of("blank-lines").replace("\n", "\n\n"), TEXT, TEXT, ""),
    "nul-bytes": (rows_of("nul-bytes").replace("fever", "fe\0ver"), TEXT, TEXT, ""),
    "duplicates": (rows_of("duplicates") + csv_row("duplicates/first", "another"), TEXT, TEXT, ""),
    "na-texts": (rows_of("na-texts").replace(f'"{TEXT}"', "NA", 1).replace(f'"{TEXT}"', "007"), "NA", "007", ""),
    "quoted": (rows_of("quoted").replace(TEXT, 'He said ""no""\nto it', 1), 'He said "no"\nto it', TEXT, ""),
    "commas": (bare("commas").replace("text", "fever, cough"), None, TEXT, ""),
    "unclosed": (rows_of("unclosed").replace(f'{TEXT}"', TEXT), None, SWALLOWED, "an unclosed quote in row 1"),
    "unclosed-last": (bare("unclosed-last").replace(f'"{TEXT}"', '"words'), "text", None, "an unclosed quote in row 2"),
}


@pytest.fixture(scope="module")
def horrors(tmp_path_factory, warm):
    """A preparation of a corpus in which next to everything is bad."""
    folder = tmp_path_factory.mktemp("horrors")
    corpus = folder / "corpus"
    for accent, (archive, *_) in ARCHIVES.items():
        write_part(corpus, accent, "train", rows_of(accent, [*BOTH, "x", *TEN]), archive)
    for name, (table, *_) in TABLES.items():
        write_part(corpus, name, "train", table, tar(two(name)))
    before = modified(corpus)
    flags = "--dataset corpus --data_dir audio --output_dir out --prepare_only --num_proc 1".split()
    done = succeeded(warm.run(*flags, cwd=folder))
    assert modified(corpus) == before and {path.name for path in folder.iterdir()} == {"corpus", "audio", "out"}
    assert not list(folder.parent.rglob("climbs.wav")) and not Path("/tmp/outside").exists()
    clips = {row["clip"]: row for row in rows_in(folder / "audio") if not row["problem"]}
    return SimpleNamespace(stderr=done.stderr, clips=clips, skipped=skipped(folder / "out"))


@pytest.mark.parametrize("accent", ARCHIVES)
def test_a_bad_archive_gives_what_can_be_had(horrors, accent):
    _, used, left_out = ARCHIVES[accent]
    found = [name for name in horrors.clips if name.startswith(f"{accent}/")]
    assert sorted(found) == sorted(f"{accent}/{name}.wav" for name in used)
    for name, reason in left_out.items():
        assert any(name in clip and re.search(reason, found) for _, clip, found in horrors.skipped), name


@pytest.mark.parametrize("name", TABLES)
def test_an_odd_table_is_read_and_said_to_be_odd(horrors, name):
    _, *texts, warning = TABLES[name]
    for clip, text in zip(BOTH, texts):
        key = f"{name}/{clip}.wav"
        assert horrors.clips.get(key, {}).get("text") == text
        reasons = [why for _, clip, why in horrors.skipped if clip == key]
        assert reasons == (["no transcript"] if text is None else [])
    lines = [line for line in horrors.stderr.splitlines() if re.search(f"warning.*/{name}/\\w+.csv", line)]
    assert len(lines) == bool(warning) and all(warning in line for line in lines)
    assert horrors.stderr.count("1 row, such as of duplicates/first.wav, with another text than a row before") == 1
    more = [clip for _, clip, why in horrors.skipped if why.startswith("more cells than columns (row 1)")]
    assert [clip.split("/")[-1] for clip in more] == ["cough"]


def archives(table=None, archive=None, split="train"):
    table = rows_of("x", split=split) if table is None else table
    return lambda folder: write_part(folder, "x", split, table, tar(two("x")) if archive is None else archive)


def recordings(table, name="metadata.csv"):
    return lambda folder: (write(folder / name, table), write((folder / name).parent / "a.wav", GOOD))


def parquets(readme="", **columns):
    def make(folder):
        write(folder / "README.md", f"---\n{readme}\n---\n" if readme else "")
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one"], **columns}), folder / "test.parquet")

    return make


CELL = [{"bytes": b"", "path": "a.wav"}]
CONFIGS = "configs: [{config_name: en, data_files: test.parquet}, {config_name: fr, data_files: test.parquet}]"
STRANGE = "configs: [{config_name: a, data_files: [{split: 1}]}]"
HEAD, ONE = "file_name,text", "a.wav,one\n"
NOT_AUDIO, NO_WORDS = tar([(member("x/first"), b"x")]), rows_of("x", split="test").replace(TEXT, "?!")
ONE_CLIP, JSON_LINES, EVAL = f"{HEAD}\n{ONE}", "metadata.jsonl", "--eval_only"
NO_PATHS, LIST = rows_of("x").replace("audio_paths", "x"), '{"file_name": "a.wav", "text": ["one"]}'
SOURCES = {  # name: (how it is made, flags, exit status, what the message says)
    "no texts": (archives(rows_of("x").replace("transcript", "x")), "", 2, "no column text.*--text_column.*user_ids"),
    "no path": (archives(NO_PATHS), "", 1, "no column file_name or audio_paths.*user_ids"),
    "an empty table": (archives(""), "", 2, "no column text.*columns are none"),
    "a page": (archives("<html>Service unavailable</html>"), "", 2, "no column text.*columns are <html>"),
    "no rows": (archives(HEADER + "\n"), "", 1, "no train clip is left"),
    "no words": (archives(NO_WORDS, split="test"), EVAL, 1, "no test transcript has a word to score: 2 clips"),
    "nothing packed": (archives(None, b"", "test"), EVAL, 1, "left: 2 x no audio, 1 x damaged archive"),
    "no audio": (archives(None, NOT_AUDIO, "test"), EVAL, 1, "left: 1 x undecodable audio, 1 x no audio"),
    "nothing": (lambda folder: folder.mkdir(), "", 1, "has no audio/<accent>/<split>.*metadata.csv.*0 files"),
    "other files": (recordings("", "notes.txt"), "", 1, "has no audio/<accent>/<split>.*2 files, such as a.wav"),
    "no folder": (lambda folder: None, "", 1, "own .*--dataset|own.*owner/name"),
    "broken JSON": (recordings('{"file_name": "a.wav"\n', JSON_LINES), "", 1, "metadata.jsonl is not lines of JSON"),
    "no file_name": (recordings("wav,text\n" + ONE), "", 1, "metadata.csv has no column file_name.*wav, text"),
    "a list": (recordings(LIST, JSON_LINES), "", 2, "column text holds a list.*one"),
    "a struct": (parquets(audio=CELL, text=[{"words": "one"}]), "", 2, "test.parquet: column text holds a dict.*words"),
    "no such file": (recordings(HEAD + "\nb.wav,one"), "", 1, "metadata.csv names no file.* 1 row, such as b.wav"),
    "two texts": (recordings(f"{HEAD},sentence\na.wav,one,two"), "", 2, "text and sentence.*--text_col"),
    "other texts": (recordings(ONE_CLIP), "--text_column words", 2, "no column words.*--text_column"),
    "no splits": (recordings(f"{HEAD},speaker\na.wav,one,ada"), "", 1, "no dev and no test split, and 1 speaker"),
    "no speakers": (recordings(ONE_CLIP), "", 1, "no dev and no test split, and 0 speakers .*such as speaker"),
    "no train": (recordings(ONE_CLIP, "test/metadata.csv"), "", 1, "has no train.* split"),
    "a stream": (recordings(ONE_CLIP), "--streaming --max_steps 2", 2, "--streaming is for AfriSpeech-200's"),
    "a config of none": (recordings(ONE_CLIP), ":fr", 2, "names 'fr'"),
    "no audio column": (parquets(sound=["a.wav"]), "", 1, "test.parquet has no audio column.*text, sound"),
    "two audio columns": (parquets(left=CELL, right=CELL), "", 1, "test.parquet has more than one: left, right"),
    "no parquet": (recordings("PAR1", "test.parquet"), "", 1, "test.parquet cannot be read as parquet"),
    "several configs": (parquets(CONFIGS, audio=CELL), "", 2, "en.*fr"),
    "another config": (parquets(CONFIGS, audio=CELL), ":de", 2, "'de'.*en.*fr"),
    "a strange README": (parquets(STRANGE, audio=CELL), "", 2, "--dataset"),
    "no README": (parquets("made: 2023-02-30", audio=CELL), "", 2, "--dataset.*day is out of range"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_cannot_be_used_is_refused(tmp_path, name):
    make, flags, status, message = SOURCES[name]
    make(tmp_path / "own")
    config, flags = (flags, []) if flags.startswith(":") else ("", flags.split())
    mode = flags if EVAL in flags or "--streaming" in flags else ["--dry_run", *flags]
    folders = f"--dataset ./own{config} --data_dir audio --output_dir out --num_proc 1 --model".split()
    refused(run_main(tmp_path, *mode, *folders, MODEL), status, message)


def edit(old, new):
    return lambda content: content.replace(old.encode(), new.encode())


def edit_weights(change):
    """A function that makes change({name: weight}) out of a safetensors file's content."""
    return lambda content: save(change(load(content)), {"format": "pt"})


CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "processor_config.json"
MODELS = {  # kind: (files of a copy of the small model, their content made of what it was or None, what is said)
    "no config": (CONFIG, None, "config.json"),
    "no weights": (WEIGHTS, None, "safetensors"),
    "no processor": (PROCESSOR, None, "processor"),
    "no tokenizer": ("tokenizer.json tokenizer_config.json", None, "tokenizer"),
    "broken tokenizer": ("tokenizer.json", lambda _: b"{}", "cannot be loaded"),
    "cut weights": (WEIGHTS, lambda content: content[:99_999], "cannot be loaded"),
    "another class": (CONFIG, lambda _: b'{"model_type": "wav2vec2"}', "wav2vec2.*lasr_ctc"),
    "another size": (CONFIG, edit('"hidden_size": 96', '"hidden_size": 192'), "lacks weights"),
    "another vocabulary": (CONFIG, edit('"vocab_size": 172', '"vocab_size": 179'), "lacks weights.*ctc_head"),
    "no head": (WEIGHTS, edit_weights(lambda w: {name: w[name] for name in w if "head" not in name}), "lacks .*head"),
    "other names": (WEIGHTS, edit_weights(lambda w: {f"x.{name}": w[name] for name in w}), "lacks weights"),
    "NaN": (WEIGHTS, edit_weights(lambda w: {name: w[name] * float("nan") for name in w}), "not finite"),
    "8 kHz": (PROCESSOR, edit("16000", "8000"), "8,?000 Hz"),
    "64 mel bins": (PROCESSOR, edit('"feature_size": 128', '"feature_size": 64'), "processor|features|mel"),
    "another extractor": (PROCESSOR, edit("LasrFeature", "ParakeetFeature"), "cannot be loaded"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_cannot_be_used_is_refused(tmp_path, kind):
    names, spoil, message = MODELS[kind]
    shutil.copytree(MODEL, tmp_path / "model")
    for path in (tmp_path / "model" / name for name in names.split()):
        path.write_bytes(spoil(path.read_bytes())) if spoil else path.unlink()
    write(tmp_path / "visit.wav", GOOD)
    refused(run_main(tmp_path, "--transcribe", "visit.wav", "--model", "./model"), 1, f"model \\./model .*{message}")


@pytest.mark.parametrize("flags, message", [
    ("--optim adamw_bnb_8bit", "bitsandbytes"),
    ("--lr_scheduler_kwargs foo", "."),
    ("--adam_beta1 2", "Invalid beta"),
    ("--neftune_noise_alpha 5", "get_input_embeddings"),
])  # fmt: skip
def test_what_the_trainer_alone_can_judge_is_a_usage_error(demo, tmp_path, flags, message):
    done = run_main(tmp_path, *kills.flags(demo.audio, "out", "--skip_baseline", *flags.split()))
    refused(done, 2, message)


def test_a_checkpoint_without_its_optimizer_is_not_gone_on_from(demo, tmp_path):
    flags = kills.flags(demo.audio, "out", *"--skip_baseline --save_only_model true --max_steps".split())
    succeeded(run_main(tmp_path, *flags, 2))
    before = modified(tmp_path / "out")
    for more in ([], ["--resume_from_checkpoint", "out/checkpoint-2"]):
        refused(run_main(tmp_path, *flags, 4, *more), 2, "out/checkpoint-2 has no optimizer.pt")
    assert modified(tmp_path / "out") == before


def test_audio_inside_the_output_folder_survives_a_new_start(demo, tmp_path):
    shutil.copytree(demo.audio, tmp_path / "out/audio")
    before = modified(tmp_path / "out/audio", "*.arrow")
    for more in ([], ["--overwrite_output_dir"]):
        flags = ["--skip_baseline", "--max_steps", "1", "--eval_steps", "1", "--save_steps", "1", *more]
        done = succeeded(run_main(tmp_path, *kills.flags("out/audio", "out", *flags)))
        assert "preparing audio" not in done.stderr and "finished" not in done.stdout
        assert modified(tmp_path / "out/audio", "*.arrow") == before


# Root without its capabilities is refused what others are.
POWERLESS = """
import ctypes, struct
ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))"""
CLOSED = {  # what is closed: (its mode, flags, exit status, what the message says)
    "shut": (0o555, "--output_dir shut/out", 2, "--output_dir is .*shut is no folder that can be written"),
    "shut/": (0o555, "--data_dir shut/audio", 2, "--data_dir is .*shut is no folder that can be written"),
    "corpus/audio/x": (0, "--dry_run --dataset ./corpus", 1, "corpus cannot be read .*Permission"),
    "corpus/transcripts/x/train.csv": (0, "--dry_run --dataset ./corpus", 1, "train.csv cannot be read .*Permission"),
    "scores.jsonl": (0, "--score_file scores.jsonl", 2, "--score_file .*cannot be read .*Permission"),
    "run.yaml": (0, "run.yaml", 2, "run.yaml .*Permission"),
    "model/model.safetensors": (0, "--transcribe visit.wav --model ./model", 1, "model .*cannot be loaded"),
    "visit.wav": (0, f"--transcribe visit.wav --model {MODEL}", 1, "visit.wav .*Permission"),
}


@pytest.mark.parametrize("name", CLOSED)
def test_what_may_not_be_opened_is_named(tmp_path, warm, name):
    mode, flags, status, message = CLOSED[name]
    write_part(tmp_path / "corpus", "x", "train", rows_of("x"), tar(two("x")))
    shutil.copytree(MODEL, tmp_path / "model")
    files = {"scores.jsonl": ROW, "run.yaml": "seed: 7", "visit.wav": GOOD, "shut/x": ""}
    for file, content in files.items():
        write(tmp_path / file, content)
    (tmp_path / name).chmod(mode)
    done = warm.run(*flags.split(), "--use_cpu", "true", patch=POWERLESS, cwd=tmp_path)
    (tmp_path / name).chmod(0o755)
    refused(done, status, message)
