import pytest
from helpers import label_encoder, small_processor

from finetune_medasr import LabelEncoder, normalize_paper, normalize_wer

# Text as it stands in AfriSpeech-200, and the same in the characters that MedASR's tokenizer covers.
FOLDED = [
    ("The patient has a fever.", "The patient has a fever."),
    ("THE PATIENT HAS MALARIA", "THE PATIENT HAS MALARIA"),
    ("200 mg, 11 too good", "200 mg, 11 too good"),
    ("1100 mm, 2.55", "1100 mm, 2.55"),
    ("don’t ‘stop’", "don't 'stop'"),
    ("a “quoted” word", 'a "quoted" word'),
    ("2–3 days", "2-3 days"),
    ("yes — no", "yes — no"),
    ("non‑breaking", "non-breaking"),
    ("200\u00a0mg", "200 mg"),
    ("5\u202fmg\u2009daily", "5 mg daily"),
    ("saw\tthe\nchild \r\n\n today ", "saw the child today"),
    ("the patient&apos;s", "the patient's"),
    ("R&amp;D, R & D, R&D", "R and D, R and D, R and D"),
    ("200&nbsp;mg", "200 mg"),
    ("38°", "38 degrees"),
    ("38 °C.", "38 degrees C."),
    ("20 µg", "20 mcg"),  # U+00B5, the micro sign
    ("20 μg daily", "20 mcg daily"),  # U+03BC, the Greek letter
    ("20 µL", "20 uL"),
    ("5±2", "5+/-2"),
    ("3×4", "3x4"),
    ("≤5", "less than or equal to 5"),
    ("≥ 10", "greater than or equal to 10"),
    ("<18 or >65", "less than 18 or greater than 65"),
    ("pH = 7", "pH equals 7"),
    ("me@site", "me at site"),
    ("Patient #3", "Patient 3"),
    ("x^2", "x 2"),
    ("~5", "-5"),
    ("either|or \\", "either/or /"),
    ("a_b *", "a_b *"),
    ("and so on…", "and so on..."),
    ("café naïve", "cafe naive"),
    ("cafe\u0301", "cafe"),  # the accent as a character of its own
    ("Ọlọ́run ẹ ṅ", "Olorun e n"),
    ("eﬁcacy, ﬂu", "eficacy, flu"),
    ("ɛ ɔ ŋ ɓ", "e o n b"),
    ("kg/m²", "kg/m2"),
    ("CO₂", "CO2"),
    ("½ tablet", "1/2 tablet"),
    ("1½ tablets", "1 1/2 tablets"),
    ("10⁹/L", "10 9/L"),
    ("((a) b) c", "a b c"),
    ("α and β-blockers", "alpha and beta-blockers"),
    ("zero\u200bwidth\ufeff", "zerowidth"),
    ("soft\u00adhyphen", "softhyphen"),
    ("well 😀 done", "well done"),
    ("the (paired) one", "the paired one"),
    ("paired(s)", "paired s"),
    ("1) first 2) second", "1) first 2) second"),
    ("(open", "open"),
    ("after lunch -> treated with", "after lunch treated with"),
    ("a --> b => c <- d • e → f ➔ g", "a b c d e f g"),
    ("glucose <-5, age => 18", "glucose less than -5, age equals greater than 18"),
    ("patients&notes &amp; &unknown; &#39;x&#x27;", "patients and notes and and unknown; 'x'"),
    ("α-blocker, β2, 5 μm ΔG", "alpha-blocker, beta2, 5 um deltaG"),
    ("[FINDINGS] 50% + {period}", "[FINDINGS] 50% + {period}"),
    ("a;b: c? d! -e/f", "a;b: c? d! -e/f"),
    ("日本", ""),
    ("", ""),
    (" \n ", ""),
]
# What could pass for a special token, and symbols whose wording is a matter of taste.
MORE_TEXTS = [
    "</s>",
    "<s>",
    "<unk>",
    "<epsilon>",
    "a<extra_id_7>b",
    "$5 and €5",
    "№ 5 ™ ® ‰",
    "5×10⁹",
    "´`′″",
    "• item · item",
    "œdema Æ ß ø",
    "🤰🏾",
    "\x00\x07",
    "ÅÄÖ",
    "\u0301",
]


@pytest.mark.parametrize("text, folded", FOLDED)
def test_transcripts_are_folded_to_what_the_tokenizer_covers(text, folded):
    assert label_encoder().fold(text) == folded


@pytest.mark.parametrize("text", [text for text, _ in FOLDED] + MORE_TEXTS)
def test_labels_are_ids_the_head_can_emit_and_spell_the_folded_text(text):
    encoder, tokenizer = label_encoder(), small_processor().tokenizer
    labels = encoder([text])[0]
    assert not {tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id} & set(
        labels
    )
    assert all(0 <= label < encoder.vocab_size for label in labels)
    # Nothing may be lost between the folded text and its labels. Grouping would collapse doubled letters.
    assert tokenizer.decode(labels, group_tokens=False) == encoder.fold(text)


def test_dropped_characters_are_counted_and_invisible_ones_are_not():
    encoder = label_encoder()
    encoder(["# 1^2 #3 日 a\u200bb\u00adc\ufeff é ’ (x)", "(open $5"])
    assert encoder.dropped == {"#": 2, "^": 1, "日": 1, "(": 1, "$": 1}


def test_what_a_tokenizer_covers_decides_what_is_folded():
    from transformers import LasrTokenizer

    pieces = ["<epsilon>", "<s>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz(é"]
    tokenizer = LasrTokenizer(
        vocab=[(piece, -2.0) for piece in pieces], bos_token="<s>", pad_token="<epsilon>", extra_ids=0
    )
    encoder = LabelEncoder(tokenizer, len(pieces), "as_written")
    labels = encoder(["cafe\u0301 (naïve) 38 ± a…"])[0]
    assert tokenizer.unk_token_id not in labels
    assert tokenizer.decode(labels, group_tokens=False).split() == ["café", "(naive", "a"]
    assert encoder.dropped["3"] == 1
    # A head that is smaller than the tokenizer cannot emit the last pieces.
    encoder = LabelEncoder(tokenizer, pieces.index("é"), "as_written")
    assert tokenizer.decode(encoder(["café"])[0], group_tokens=False) == "cafe"


@pytest.mark.parametrize(
    "text, folded",
    [
        ("The patient’s BP is high.", "the patient's bp is high"),
        ("Give 20 µg; then {comma} (rest)!", "give 20 mcg then rest"),
        ("[FINDINGS]\u00a0Café", "findings cafe"),
        ("...", ""),
    ],
)
def test_target_text_words_trains_on_lower_case_words_alone(text, folded):
    encoder = label_encoder("words")
    assert encoder.fold(text) == folded
    assert small_processor().tokenizer.decode(encoder([text])[0], group_tokens=False) == folded


@pytest.mark.parametrize(
    "text, normal",
    [
        ("", ""),
        (" . ", ""),
        ("The PATIENT has a fever.", "the patient has a fever"),
        ("{period}", ""),
        ("fever {comma} cough {period} {new paragraph} [FINDINGS] {colon} clear", "fever cough findings clear"),
        ("fever</s>", "fever"),
        ("<s>fever<epsilon> </s>", "fever"),
        ("no fever full stop.", "no fever full stop"),  # a spoken mark that was transcribed is a word
        ("fever koma, cough", "fever koma cough"),
        ("200\u00a0mg", "200 mg"),
        ("one\ntwo\tthree  four", "one two three four"),
        ("don’t", "don't"),
        ("don't", "don't"),
        ("donʼt don`t", "don't don't"),
        ("‘the dogs’ bone’, 'twas", "the dogs bone twas"),
        ("“quoted”", "quoted"),
        ("the patient&apos;s", "the patient's"),
        ("R&amp;D", "r and d"),
        ("20 µg at 38°", "20 mcg at 38 degrees"),
        ("1½ tablets", "1 1 2 tablets"),
        ("10⁹/L", "10 9 l"),
        ("mightincrease", "mightincrease"),
        ("200 mg, 11", "200 mg 11"),
        ("2.5", "2 5"),
        ("120/80", "120 80"),
        ("x-ray 2–3", "x ray 2 3"),
        ("(paired) [x] a_b", "paired x a b"),
        ("50% >5 & <3", "50 greater than 5 and less than 3"),
        ("Ọlọ́run café cafe\u0301", "olorun cafe cafe"),
        ("ﬁnding m²", "finding m2"),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
        ("ɔkyɛ", "okye"),
    ],
)
def test_normalize_wer_leaves_lower_case_words(text, normal):
    assert normalize_wer(text) == normal


@pytest.mark.parametrize("text", [text for text, _ in FOLDED if text != "日本"])
def test_labels_and_references_are_read_alike(text):
    """Whatever a label spells, the reference of the same transcript has to hold: the model can write nothing else."""
    assert normalize_wer(label_encoder().fold(text)) == normalize_wer(text)


@pytest.mark.parametrize(
    "text, normal",
    [
        ("", ""),
        ("The PATIENT has a fever.", "the patient has a fever."),
        ("full stop.", "full stop."),  # only after a space
        ("No fever full stop.", "no fever."),
        ("No fever full stop", "no fever."),
        ("no fever full stop. Next", "no fever. next"),
        ("no fever full stop, next", "no fever., next"),
        ("fever comma, cough", "fever, cough"),
        ("fever comma cough", "fever comma cough"),
        ("fever koma, cough", "fever cough"),
        ("fever coma, cough", "fever cough"),
        ("fever koma cough", "fever koma cough"),
        ("fever comma,. Next", "fever. next"),
        ("fever,, cough", "fever, cough"),
        ("fever Comma, cough FULL STOP", "fever, cough."),
        ("one\ntwo", "onetwo"),
        ("one \ntwo", "one two"),
        ("one\n\ntwo\n", "one two"),
        ("one\ttwo", "one two"),
        ("one \t two   three ", "one two three"),
        ("\nfull stop", "full stop"),
        ("a > b >5", "a b 5"),
        ("a>b", "ab"),
        ("200\u00a0mg", "200 mg"),
        ("don’t", "dont"),
        ("don't", "don't"),
        ("the patient&apos;s", "the patientaposs"),
        ("mightincrease", "mightincrease"),
        ("2.5 mg, 120/80", "2.5 mg, 120/80"),
        ("50% (2-3) [x] a+b: c? 'd'", "50% (2-3) [x] a+b: c? 'd'"),
        ('{period} "a"; b! c_d = #1 & @', "period a b cd  1  "),  # characters go last: what they leave behind stays
        ("20 µg 38° 2–3 café", "20 g 38 23 caf"),
    ],
)
def test_normalize_paper_follows_the_authors_steps_in_their_order(text, normal):
    assert normalize_paper(text) == normal
