"""What becomes of a transcript: labels that the model can emit, and the texts that are compared."""

import sys
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis.strategies import sampled_from, text
from small_model import label_encoder, processor
from transformers import LasrTokenizer

from finetune_medasr import RATES, LabelEncoder, normalize_paper, normalize_wer

# Text as it stands in AfriSpeech-200, and the same in the characters that MedASR's tokenizer covers.
FOLDED = {
    "The patient has a fever. THE PATIENT HAS MALARIA": "The patient has a fever. THE PATIENT HAS MALARIA",
    "200 mg, 11 too good, 1100 mm, 2.55": "200 mg, 11 too good, 1100 mm, 2.55",  # CTC would collapse doubles
    "don’t ‘stop’ “quoted”": "don't 'stop' \"quoted\"",
    "2–3 days, yes — no, non‑breaking": "2-3 days, yes — no, non-breaking",
    "saw\tthe\nchild \r\n\n 200\u00a0mg 5\u202fmg\u2009daily ": "saw the child 200 mg 5 mg daily",
    "the patient&apos;s 200&nbsp;mg R&amp;D, R & D, R&D": "the patient's 200 mg R and D, R and D, R and D",
    "patients&notes a&lt &amp; &unknown; &#39;x&#x27;": "patients and notes a and lt and and unknown; 'x'",
    "38 °C, 38°": "38 degrees C, 38 degrees",
    "37 ℃ R＆D": "37 degrees C R and D",  # what NFKD makes of a character is folded too
    "20 µg, 20 μg daily": "20 mcg, 20 mcg daily",  # U+00B5, the micro sign; U+03BC, the Greek letter
    "20 µL, 5 μm": "20 uL, 5 um",
    "5±2, 3×4, ~5, x^2, pH = 7": "5+/-2, 3x4, -5, x 2, pH equals 7",
    "≤5 ≥ 10 <18 or >65": "less than or equal to 5 greater than or equal to 10 less than 18 or greater than 65",
    "me@site Patient #3 either|or \\ a_b *…": "me at site Patient 3 either/or / a_b *...",
    "café naïve cafe\u0301 Ọlọ́run ẹ ṅ ɛ ɔ ŋ ɓ": "cafe naive cafe Olorun e n e o n b",  # accents of their own, too
    "eﬁcacy, ﬂu, kg/m² CO₂ 10⁹/L": "eficacy, flu, kg/m2 CO2 10 9/L",
    "½ tablet, 1½ tablets": "1/2 tablet, 1 1/2 tablets",
    "α-blocker, β2, ΔG": "alpha-blocker, beta2, deltaG",
    "zero\u200bwidth\ufeff soft\u00adhyphen, well 😀 done": "zerowidth softhyphen, well done",
    "the (paired) one, paired(s) ((a) b) c": "the paired one, paired s a b c",
    "1) first 2) second (open": "1) first 2) second open",  # the tokenizer has ")" and no "("
    "treated -> with, a --> b => c <- d • e → f ➔ g": "treated with, a b c d e f g",
    "a ≠ 5, 5 ㎍, Łukasz Đ ẞ": "a not equal to 5, 5 mcg, Lukasz D SS",
    "glucose <-5, age => 18": "glucose less than -5, age equals greater than 18",
    "[FINDINGS] 50% + {period} a;b: c? d! -e/f": "[FINDINGS] 50% + {period} a;b: c? d! -e/f",
    " \n ": "",
}
# What could pass for a special token, what nothing is left of, and symbols whose wording is a matter of taste.
MORE_TEXTS = (
    "</s>|<s>|<unk>|<epsilon>|a<extra_id_7>b|$5 and €5|№ 5 ™ ® ‰|5×10⁹|´`′″|œdema Æ ß ø|🤰🏾|\0\a|ÅÄÖ|\u0301|日本"
)


def spelled(encoder, text):
    """What the labels of a text spell, doubled letters included."""
    return encoder.tokenizer.decode(encoder([text])[0], group_tokens=False)


@pytest.mark.parametrize("text", [*FOLDED, *MORE_TEXTS.split("|")])
def test_labels_spell_the_transcript_in_what_the_model_can_emit(text):
    encoder, tokenizer = label_encoder(), processor().tokenizer
    labels, spelling = set(encoder([text])[0]), spelled(encoder, text)
    special = {tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    assert not special & labels and all(0 <= label < encoder.vocab_size for label in labels)
    assert spelling == FOLDED.get(text, spelling)
    # The model can write nothing but what its labels spell, so the reference has to be read like that.
    assert text not in FOLDED or normalize_wer(spelling) == normalize_wer(text)


def test_dropped_characters_are_counted_and_invisible_ones_are_not():
    encoder = label_encoder()
    encoder(["# 1^2 #3 日 a\u200bb\u00adc\ufeff x\a\u0301 é ’ (x)", "(open $5"])
    assert encoder.dropped == {"#": 2, "^": 1, "日": 1, "(": 1, "$": 1}


def test_what_a_tokenizer_covers_decides_what_is_folded():
    pieces = ["<epsilon>", "<s>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz(é"]
    vocabulary = [(piece, -2.0) for piece in pieces]
    tokenizer = LasrTokenizer(vocab=vocabulary, bos_token="<s>", pad_token="<epsilon>", extra_ids=0)
    encoder = LabelEncoder(tokenizer, len(pieces), "as_written")
    assert spelled(encoder, "cafe\u0301 (naïve) 38 ± a…").split() == ["café", "(naive", "a"]
    assert encoder.dropped["3"] == 1
    # A head that is smaller than the tokenizer cannot emit the last pieces.
    assert spelled(LabelEncoder(tokenizer, pieces.index("é"), "as_written"), "café") == "cafe"


def test_target_text_words_trains_on_lower_case_words_alone():
    text = "The patient’s BP: give 20 µg; then {comma} (rest)! [FINDINGS]\u00a0Café ..."
    assert spelled(label_encoder("words"), text) == "the patient's bp give 20 mcg then rest findings cafe"


NORMAL = {
    " . {period}": "",
    "The PATIENT has a fever.": "the patient has a fever",
    "fever {comma} cough {period} {new paragraph} [FINDINGS] {colon} clear": "fever cough findings clear",
    "<s>fever<epsilon> </s>": "fever",
    "no fever full stop. fever koma, cough": "no fever full stop fever koma cough",  # spoken, and transcribed
    "one\ntwo\tthree  four\u00a0mg mightincrease": "one two three four mg mightincrease",
    "don’t don't donʼt don`t ‘the dogs’ bone’, 'twas “x”": "don't don't don't don't the dogs bone twas x",
    "the patient&apos;s R&amp;D": "the patient's r and d",
    "20 µg at 38° or 37 ℃, R＆D Acme™": "20 mcg at 38 degrees or 37 degrees c r and d acmetm",
    "39 ℃, № 5, Panadol™ 𝐀𝚺": "39 degrees c no 5 panadoltm asigma",
    "1½ tablets, 10⁹/L, 200 mg, 2.5, 120/80": "1 1 2 tablets 10 9 l 200 mg 2 5 120 80",
    "1,200 12,345,678, 1，200.50 (9,000), 3,000": "1200 12345678 1200 50 9000 3000",  # a number is one word
    "1,2 120,80 1,2000 0,123 080,123,456 2.1,200": "1 2 120 80 1 2000 0 123 080 123 456 2 1 200",  # these are several
    "हिन्दी क्षमा, สวัสดี กุมภาพันธ์ が 한국어": "हिन्दी क्षमा สวัสดี กุมภาพันธ์ が 한국어",  # vowel signs are of the word
    "5️⃣ ❤️ مُحَمَّد שָׁלוֹם": "5 محمد שלום",
    "be\x00fore \x07 bell": "before bell",
    "x-ray 2–3 (paired) [x] a_b": "x ray 2 3 paired x a b",
    "50% >5 & <3": "50 greater than 5 and less than 3",
    "Ọlọ́run café cafe\u0301 ɔkyɛ": "olorun cafe cafe okye",
    "ﬁnding m² soft\u00adhyphen zero\u200bwidth": "finding m2 softhyphen zerowidth",
}


def check_normalised(text):
    """The result is lower-case words, a fixed point, and the same however the accents of the text are encoded."""
    result = normalize_wer(text)
    assert result == result.lower() == " ".join(result.split()) == unicodedata.normalize("NFC", result)
    assert normalize_wer(result) == result == normalize_wer(unicodedata.normalize("NFD", text))


@pytest.mark.parametrize("pattern", ["{0}", "7{0}8 {0}x E{0}"])
def test_whatever_unicode_brings_the_normalised_text_is_a_fixed_point(pattern):
    for first in range(0, sys.maxunicode, 256):
        check_normalised(" ".join(pattern.format(chr(code)) for code in range(first, first + 256)))


@given(text() | text(sampled_from("aZ19,.'’`{}<>&;#-→½²µ™℃ßŁΣς\u0130\u0301\u0338\u093f\u200d\ufe0f\u00a0\n \t")))
@example("1,2\u0301345 '\u093f'a &amp;lt; {a} <-1")
@settings(max_examples=1000, deadline=None)
def test_whatever_a_text_is_its_normalised_form_is_a_fixed_point(text):
    check_normalised(text)


def test_a_reference_in_ascii_words_can_be_met():
    """What labels spell is what the reference is compared as, for each character of Unicode that becomes ASCII."""
    encoder, passed_over = label_encoder(), ("Cn", "Co", "Cs", "Lo")
    for sign in [sign for sign in map(chr, range(sys.maxunicode)) if unicodedata.category(sign) not in passed_over]:
        expected = normalize_wer(written := f"a{sign}b {sign} 7{sign}8")
        assert not expected.isascii() or normalize_wer(encoder.fold(written)) == expected, hex(ord(sign))


@pytest.mark.parametrize("rate", sorted(RATES.keys() - {"wer_paper", "wer_paper_short"}))
def test_whitespace_and_the_encoding_of_accents_are_no_errors(rate):
    normalize = RATES[rate][0]
    written = normalize(" No\u00a0fever,\ncafe\u0301\t at\u2009 12 \r\n")
    assert written == normalize("No fever, caf\u00e9 at 12") and written


PAPER = {
    "The PATIENT has a fever.": "the patient has a fever.",
    "full stop.": "full stop.",  # only after a space
    "\nfull stop": "full stop",
    "No fever full stop. Next Full stop": "no fever. next.",
    "no fever full stop, next": "no fever., next",
    "fever Comma, cough comma b": "fever, cough comma b",
    "fever koma, cough coma, b koma c": "fever cough b koma c",
    "fever comma,. Next,, x": "fever. next, x",
    "one\ntwo \nthree\n\nfour\n": "onetwo three four",
    "one \t two\tthree   four ": "one two three four",
    "a > b >5 a>b": "a b 5 ab",
    "200\u00a0mg don’t don't the patient&apos;s": "200 mg dont don't the patientaposs",
    "50% (2-3) [x] a+b: c? 'd' 2.5, 120/80": "50% (2-3) [x] a+b: c? 'd' 2.5, 120/80",
    '{period} "a"; b! c_d = #1 & @': "period a b cd  1  ",  # characters go last: what they leave behind stays
    "20 µg 38° 2–3 café": "20 g 38 23 caf",
}


@pytest.mark.parametrize("normalize, expected", [(normalize_wer, NORMAL), (normalize_paper, PAPER)])
def test_texts_are_normalised_as_words_and_in_the_steps_of_the_authors(normalize, expected):
    assert {text: normalize(text) for text in expected} == expected
