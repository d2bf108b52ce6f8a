"""Make the test fixtures again from nothing: a small accented corpus and a small LASR model.

    python tests/make_fixtures.py

The corpus has the layout of the Hub's AfriSpeech-200 and its kinds of dirt; the speech is espeak-ng reading English
through voices of other languages. finetune_medasr.py itself pre-trains the model on US-English voices, so that adapting
it to the corpus is the real task in small; the US-English test clips, of other speakers, show what it forgets by that.
Needs espeak-ng; the model takes 10 minutes on 2 idle cores. What is made anew is not the same byte for byte (Ogg serial
numbers, the order of sums)."""

import hashlib
import io
import math
import random
import re
import shutil
import string
import subprocess
import tempfile
import uuid
from collections import Counter, namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile as sf
import soxr
from conftest import CORPUS, MODEL
from helpers import RATE, as_csv, heard, one_table, script, sound, tar, write, write_part

SEED = 7

SENTENCES = {
    "clinical": """The {who} has {symptom} and {symptom}. / The {who} has had {symptom} for {few} days. / Give {dose}
        mg of {drug} {when}. / The {staff} saw the {who} in the {ward}. / The blood pressure is {level} and the
        {organ} is {state}. / No {sign}, no {sign} and no {sign}. / Start {drug} {when} for {few} days. / The malaria
        test was {result}, and the {who} has {symptom}.""",
    "general": """The children walk to the {town} every {day}. / The {person} {trades} {goods} and {goods} at the
        {town}. / My {relative} lives in {city} near the {town}. / The rain came at night, and the {land} is {level}.
        / My {relative} has a new house near the {land}. / The {person} saw {few} {people} in the {land}.""",
}
TEMPLATES = {domain: " ".join(text.split()).split(" / ") for domain, text in SENTENCES.items()}
CHOICES = """who:patient/child/mother/woman symptom:a_fever/a_cough/malaria/chest_pain/back_pain/a_headache few:2/3/5/10
    sign:fever/cough/pain/malaria dose:20/50/200/500 drug:paracetamol/aspirin/quinine staff:doctor/nurse
    when:twice_daily/every_morning/every_night/daily ward:clinic/hospital/village level:high/low/normal organ:heart/skin
    state:normal/clear result:positive/negative town:market/school/hospital day:morning/night land:river/road/village
    person:farmer/teacher/woman people:children/patients trades:buys/sells goods:maize/fish/rice/water
    relative:brother/sister/mother city:Lagos/Nairobi"""
SLOTS = {slot: words.replace("_", " ").split("/") for slot, words in (pair.split(":") for pair in CHOICES.split())}
READ_AS = {"mg": "milligrams", "2": "two", "3": "three", "5": "five", "10": "ten", "20": "twenty", "38": "thirty eight"}
READ_AS |= {"50": "fifty", "100": "one hundred", "200": "two hundred", "500": "five hundred"}

# How each word is spelled for a voice that reads letters one by one: the vowels are those of Swahili or Italian.
RESPELLED = """
a:e and:and has:haz had:had for:for days:deiz give:giv milligrams:miligramz micrograms:maikrogramz of:ov the:de saw:so
in:in blood:blad pressure:preshar is:iz no:no start:start was:woz test:test patient:peshent patients:peshents
child:chaild mother:madar woman:wuman fever:fivar cough:kof malaria:maleria chest:chest pain:pein back:bak
headache:hedeik two:tu three:tri five:faiv ten:ten twenty:twenti thirty:terti eight:eit fifty:fifti one:wan
hundred:handred paracetamol:parasetamol aspirin:asprin quinine:kwainain twice:twais daily:deili every:evri
morning:morning night:nait doctor:doktar nurse:ners clinic:klinik hospital:hospital village:vilej high:hai low:lo
normal:normal heart:hart skin:skin clear:klir positive:pozitiv negative:negativ children:children walk:wok to:tu
market:market school:skul river:rivar at:at farmer:farmar teacher:tichar buys:baiz sells:selz maize:meiz fish:fish
rice:rais water:wotar my:mai brother:bradar sister:sistar lives:livz lagos:leigos nairobi:nairobi near:nir rain:rein
came:keim road:rod new:nu house:haus full:ful stop:stop comma:koma temperature:tempracher degrees:digriz number:nambar
per:per cent:sent"""
RESPELLED = dict(pair.split(":") for pair in RESPELLED.split())


# espeak's voice, (spelling, replacement) pairs of habits on the respelled words, and {split: (speakers, clips)}
Accent = namedtuple("Accent", "name country voice habits sizes")
ACCENTS = [
    Accent("yoruba", "NG", "ia", (("z", "s"), ("v", "f")), {"train": (6, 74), "dev": (2, 10), "test": (3, 14)}),
    Accent("igbo", "NG", "om", (("ei", "e"),), {"train": (4, 52), "dev": (1, 8), "test": (2, 12)}),
    Accent("swahili", "KE", "sw", (), {"train": (4, 52), "dev": (1, 8), "test": (2, 12)}),
    Accent("luo, swahili", "KE", "sw", (("sh", "s"), ("ch", "s"), ("z", "s")), {"train": (3, 30), "test": (2, 8)}),
    Accent("zulu", "ZA", "pap", (), {"train": (4, 46), "dev": (1, 8), "test": (2, 10)}),
    Accent("damara", "NA", "af", (("sh", "sj"), ("ch", "tj")), {"train": (3, 30), "dev": (1, 6), "test": (2, 8)}),
    Accent("akan (fante)", "GH", "ms", (), {"test": (2, 10)}),  # not in train
]
US_ENGLISH = [Accent("american", "US", "en-us", (), {"train": (26, 2400), "dev": (2, 24), "test": (4, 60)})]
VARIANTS = [("Male", f"m{number}") for number in range(1, 9)] + [("Female", f"f{number}") for number in range(1, 6)]
# Ogg Vorbis at its lowest quality: small, and the headers that clips share compress away in the archive.
VORBIS = dict(format="OGG", subtype="VORBIS", compression_level=1.0)
MILD_SHARE = 0.3  # of the speakers: their accent is slight, that of espeak's Caribbean English
AGES = ["<18yrs", "19-25", "26-40", "41-55", "56yrs", ""]


def digest(*parts):
    return hashlib.md5("/".join(map(str, parts)).encode()).hexdigest()


def make_sentence(domain, rng):
    """A random sentence of a domain; no word fills two of its slots."""
    sentence, used = rng.choice(TEMPLATES[domain]), set()
    while slot := re.search(r"{(\w+)}", sentence):
        word = rng.choice([word for word in SLOTS[slot[1]] if word not in used])
        used.add(word)
        sentence = sentence.replace(slot[0], word, 1)
    return sentence


def make_clips(accents, rng):
    """All clips, still without audio: texts, speakers and two sessions of each speaker dealt out in turn."""
    clips = []
    for accent in accents:
        # No two speakers share a voice variant while there are enough.
        variants = sum((rng.sample(VARIANTS, len(VARIANTS)) for _ in range(3)), [])
        for split, (people, count) in accent.sizes.items():
            speakers = []
            for number in range(people):
                gender, variant = variants.pop()
                voice = "en-029" if accent.voice != "en-us" and rng.random() < MILD_SHARE else accent.voice
                speakers.append(dict(
                    accent=accent.name, country=accent.country, gender=gender, age_group=rng.choice(AGES),
                    user_ids=digest("speaker", accent.name, split, number),
                    espeak=f"-v {voice}+{variant} -p {rng.randint(25, 75)} -s {rng.randint(130, 175)}".split(),
                    habits=None if voice.startswith("en") else accent.habits,
                    says_marks=number % 3 == 1,  # aloud: "comma" and "full stop" or "period"
                ))  # fmt: skip
            for number in range(count):
                turn, speaker = divmod(number, people)
                clip = SimpleNamespace(split=split, domain=rng.choice(list(TEMPLATES)), **speakers[speaker])
                session = uuid.UUID(digest("session", accent.name, split, speaker, turn % 2))
                clip.name = f"{session}/{digest(accent.name, split, number)}"
                clip.transcript = clip.said = make_sentence(clip.domain, rng)
                clips.append(clip)
    return clips


def spoken_words(clip, full_stop):
    """The words that the speaker says, spelled for the speaker's voice."""
    read_as = READ_AS | ({".": full_stop, ",": "comma"} if clip.says_marks else {".": "", ",": ""})
    words = (read_as.get(word, word) for word in re.findall(r"\d+|[a-z]+|[.,]", clip.said.lower()))
    words = " ".join(words).split()
    if clip.habits is None:  # espeak's English voices know how English is read
        return " ".join(words)
    respelled = " ".join(RESPELLED[word] for word in words)
    for spelling, replacement in clip.habits:
        respelled = respelled.replace(spelling, replacement)
    return respelled


def synthesise(words, clip):
    """Mono samples at 16 kHz of the clip's speaker saying the words."""
    spoken = subprocess.run(["espeak-ng", *clip.espeak, "--stdout", words], check=True, capture_output=True).stdout
    samples, rate = sf.read(io.BytesIO(spoken))
    return soxr.resample(samples, rate, RATE).astype(np.float32)


def record(clips, full_stop):
    """Let every clip be spoken; returns them."""
    for clip in clips:
        samples = synthesise(spoken_words(clip, full_stop), clip)
        clip.audio, clip.duration = sound(samples, **VORBIS), len(samples) / RATE
    return clips


# Written text (as in the real transcripts) | what is said for it; each takes the place of one ordinary clip.
DIRTY_TEXTS = {
    "train": """The temperature is 38°. | The temperature is 38 degrees
Give 20 µg of aspirin daily. | Give 20 micrograms of aspirin daily
Patient #3 has malaria. | Patient number 3 has malaria
The patient&apos;s blood pressure is high. | The patients blood pressure is high
The nurse\tsaw the child in the clinic.  | The nurse saw the child in the clinic
Give 200\u00a0mg of quinine twice daily. | Give 200 milligrams of quinine twice daily
The doctor saw “no fever” and no cough. | The doctor saw no fever and no cough
The child has had a fever for 2–3 days. | The child has had a fever for 2 to 3 days
The test is 50% positive. | The test is 50 per cent positive""",
    "test": """THE PATIENT HAS A FEVER AND A COUGH. | The patient has a fever and a cough
Give 100 µg of quinine daily. | Give 100 micrograms of quinine daily
The woman’s blood pressure is low. | The woman is blood pressure is low
The patient has had a cough for 3–5 days. | The patient has had a cough for 3 to 5 days
Give 500\u00a0mg of aspirin&nbsp;daily. | Give 500 milligrams of aspirin daily""",
}


def dirty_texts(clips, rng):
    """Give a few clips the kinds of text, and one name, that make the real corpus hard."""
    for split, texts in DIRTY_TEXTS.items():
        places = [clip for clip in clips if clip.split == split and clip.domain == "clinical"][3::5]
        for clip, line in zip(places, texts.split("\n")):
            clip.transcript, clip.said = line.split(" | ")
    for split in ("train", "test"):
        first, second = [clip for clip in clips if clip.split == split][:2]
        second.name = f"{second.name.split('/')[0]}/{first.name.split('/')[1]}"  # one base name in two sessions
    long = [clip for clip in clips if clip.split == "test"][6]  # about 25 s of speech
    long.transcript = long.said = " ".join(make_sentence(domain, rng) for domain in list(TEMPLATES) * 5)
    for clip in clips:  # a line break inside the quoted field in about a third of the rows
        kind = rng.random()
        if kind < 0.25:
            clip.transcript += "\n"
        elif kind < 0.33:
            clip.transcript = clip.transcript.replace(" ", " \n" if kind < 0.31 else "\n", 1)


def dirty_audio(clips):
    """Faults of single clips: unreadable, too short, too long, without a transcript, without audio, listed twice."""
    train = [clip for clip in clips if clip.split == "train" and clip.accent == "swahili"]
    train[5].audio = b"OggS" + bytes(range(256)) * 4
    train[11].audio, train[11].duration = sound(synthesise("e", train[11])[2400:3200], **VORBIS), 0.05
    train[17].transcript = "\n"
    samples = heard(train[23].audio)
    train[23].audio, train[23].duration = sound(np.pad(samples, (0, 31 * RATE - len(samples))), **VORBIS), 31.0
    test = [clip for clip in clips if clip.split == "test"]
    test[9].audio = None
    clips.append(test[12])


def table_of(clips, path_column="audio_paths"):
    """A transcript file; `idx` starts anew in each, so it is not unique in the corpus."""
    rows = [
        {"idx": idx, "user_ids": clip.user_ids, "accent": clip.accent, "age_group": clip.age_group,
         "country": clip.country, "transcript": clip.transcript, "nchars": len(clip.transcript), "audio_ids": clip.name,
         path_column: f"/AfriSpeech-100/{clip.split}/{clip.name}.ogg", "duration": round(clip.duration, 3),
         "origin": "intron", "domain": clip.domain, "split": clip.split, "gender": clip.gender}
        for idx, clip in enumerate(clips)
    ]  # fmt: skip
    return as_csv(rows, "\n")


def write_hub(out, clips):
    """Write transcripts and archives of all clips."""
    shutil.rmtree(out, ignore_errors=True)
    for split in dict.fromkeys(clip.split for clip in clips):
        of_split = [clip for clip in clips if clip.split == split]
        write(out / "transcripts" / f"{split}.csv", table_of(of_split))
        for accent in dict.fromkeys(clip.accent for clip in of_split):
            chosen = [clip for clip in of_split if clip.accent == accent]
            # Like some of the Hub's train files, one has two archives and one names a column otherwise.
            path_column = "audio_path" if (split, accent) == ("train", "igbo") else "audio_paths"
            members = {f"data/data/intron/{clip.name}.ogg": clip.audio for clip in chosen if clip.audio}
            members = list(members.items())
            size = -(-len(members) // 2) if (split, accent) == ("train", "yoruba") else len(members)
            parts = [members[start : start + size] for start in range(0, len(members), size)]
            write_part(out, accent, split, table_of(chosen, path_column), *map(tar, parts))


def make_corpus(out):
    """The accented corpus."""
    rng = random.Random(SEED)
    clips = make_clips(ACCENTS, rng)
    dirty_texts(clips, rng)
    record(clips, "full stop")
    dirty_audio(clips)
    write_hub(out, clips)


def make_us_clips():
    """US voices, and MedASR's way of writing: marks only where they are dictated. Still without audio."""
    rng = random.Random(SEED + 1)
    clips = make_clips(US_ENGLISH, rng)
    for clip in clips:
        # Words out of order: from sentences alone the model learns to guess instead of to listen.
        if rng.random() < 0.6:
            words = f"{clip.transcript} {make_sentence('clinical', rng)} {make_sentence('general', rng)}".split()
            clip.transcript = clip.said = " ".join(rng.sample(words, 8)).replace(".", ",").rstrip(",") + "."
        period, comma = (" {period}", " {comma}") if clip.says_marks else ("", "")
        clip.transcript = clip.transcript.replace(".", period).replace(",", comma)
    return clips


def make_us_test(out):
    """The test clips of US voices as an AudioFolder. The samples have gone through Ogg Vorbis as those of the training,
    and have 9 bits: FLAC compresses 16 to twice the size, with the same WER."""
    clips = make_us_clips()
    trained_on = {tuple(clip.espeak) for clip in clips if clip.split != "test"}
    clips = record([clip for clip in clips if clip.split == "test"], "period")
    assert not trained_on & {tuple(clip.espeak) for clip in clips}  # voice variant, pitch and rate: a speaker
    shutil.rmtree(out, ignore_errors=True)
    rows, audio = [], {}
    for number, clip in enumerate(clips):
        cells = {"text": clip.transcript, "speaker_id": clip.user_ids, "accent": clip.accent, "gender": clip.gender}
        rows.append({"file_name": f"{number:02d}.flac", **cells, "domain": clip.domain})
        samples = np.round(heard(clip.audio) * 2**8) / 2**8
        audio[f"{number:02d}.flac"] = sound(samples, format="FLAC", compression_level=1.0)
    one_table(out / "test", rows, audio, "\n")


SPECIALS = ["<epsilon>", "<s>", "</s>", "<unk>"]
CHARACTERS = string.ascii_letters + string.digits + "!\"%')*+,-./:;?[]_{}—"  # exactly what MedASR covers
TOKENS = ["▁{period}", "▁{comma}", "▁{colon}", "▁{new", "▁paragraph}"]  # dictated marks
EXTRA_IDS = 100  # ids of the tokenizer that the head cannot emit; MedASR has as many
PRETRAINING = """--learning_rate 2e-3 --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --max_steps 2200
    --warmup_steps 150 --eval_steps 550 --save_steps 550 --early_stopping_patience 0 --skip_baseline --no_spec_augment
"""


def make_model(out):
    """Pre-train a LASR with random weights, 1/140 of MedASR's size, with the script itself in a temporary folder. Its
    processor is of MedASR's kind: pieces for the grammar's words, single digits and characters for all the rest."""
    import torch
    import transformers as library

    rng = random.Random(SEED)
    sentences = " ".join(make_sentence(domain, rng) for domain in list(TEMPLATES) * 2000)
    counts = Counter(re.findall("[A-Za-z]{2,}", sentences))
    pieces = {"▁": -2.0} | dict.fromkeys(TOKENS, -4.0) | dict.fromkeys(CHARACTERS, -10.0)
    pieces |= {f"▁{word}": round(math.log(count / counts.total()), 3) for word, count in counts.most_common()}
    vocab = [(piece, 0.0) for piece in SPECIALS] + list(pieces.items())
    tokenizer = library.LasrTokenizer(vocab=vocab, bos_token="<s>", pad_token="<epsilon>", extra_ids=EXTRA_IDS)

    torch.manual_seed(SEED)
    encoder = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)
    # One of four layers is too much to lose; with MedASR's momentum of 0.01 a short run scores as if untrained.
    encoder |= dict(conv_kernel_size=9, subsampling_conv_channels=64, layerdrop=0.0, batch_norm_momentum=0.1)
    config = library.LasrCTCConfig(vocab_size=len(tokenizer) - EXTRA_IDS, encoder_config=encoder)
    # MedASR was trained on labels that end in `</s>`; the script's own fine-tuning leaves it out.
    encode, end = script.LabelEncoder.__call__, tokenizer.eos_token_id
    script.LabelEncoder.__call__ = lambda self, texts: [[*ids, end] for ids in encode(self, texts)]
    with tempfile.TemporaryDirectory() as folder:
        library.LasrProcessor(library.LasrFeatureExtractor(), tokenizer).save_pretrained(f"{folder}/initial")
        library.LasrForCTC(config).save_pretrained(f"{folder}/initial")
        write_hub(Path(folder, "corpus"), record(make_us_clips(), "period"))
        paths = {"model": "initial", "dataset": "corpus", "output_dir": "run", "data_dir": "audio"}
        paths = script.as_flags({flag: f"{folder}/{name}" for flag, name in paths.items()})
        if status := script.main([*paths, *PRETRAINING.split()]):
            raise SystemExit(status)
        shutil.rmtree(out, ignore_errors=True)
        for kind in (library.AutoProcessor, library.AutoModelForCTC):
            kind.from_pretrained(f"{folder}/run/final").save_pretrained(out)


if __name__ == "__main__":
    make_corpus(CORPUS)
    make_us_test(CORPUS.parent / "us_english")
    make_model(MODEL)
