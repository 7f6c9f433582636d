"""What a file that is not UTF-8 is recognized as: the command in the message must give its text back."""

import random
import re

import pytest

from fastbert.encodings import EXAMINED, explain
from fastbert.errors import UserError
from fastbert.inputs import not_utf8, refuse_zero_bytes

GERMAN = "Die Mütter prüfen „Größe“ und Maß – für 5 € mehr.\nÜber Öfen\n"
FRENCH = "L’élève a déjà reçu « le cœur » à l’hôtel où naît la forêt…\n"
POLISH = "Zażółć gęślą jaźń, proszę; część się już wyśle\n"
CZECH = "Příliš žluťoučký kůň úpěl ďábelské ódy\n"
RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю\n"
UKRAINIAN = "Їжак їв гриби в лісі, а потім ішов до своєї хати\n"
GREEK = "Η γλώσσα που μιλούν οι άνθρωποι στην Αθήνα\n"
JAPANESE = "日本語の文章をここに書いてみます。カタカナもあります。\n"
KATAKANA = "ファイル\n"
CHINESE = "我们在这里写一些中文的句子，然后看看结果。\n"
TAIWANESE = "我們在這裡寫一些中文的句子，然後看看結果。\n"
KOREAN = "우리는 여기에 한국어 문장을 쓰고 결과를 봅니다.\n"
ASCII = "plain words of English come first\n"

ENCODED = [
    *[(text, "cp1252") for text in (GERMAN, FRENCH, "Größe\n", "a café", "naïve\n", "It’s a “quote” – 5 €\n")],
    *[(text, "cp1252") for text in ("Vai à praia com os amigos\n", "Roma è bella, e la notte è lunga ma è calda\n")],
    *[("Die Mütter essen Käse\n", name) for name in ("latin-1", "mac_roman", "cp850")],
    ("Der Preis ist 5 € für Œuvre und cœur\n", "iso8859-15"),
    *[(text, name) for text in (POLISH, CZECH) for name in ("cp1250", "iso8859-2")],
    *[(RUSSIAN, name) for name in ("cp1251", "koi8-r", "cp866", "iso8859-5")],
    *[(UKRAINIAN, name) for name in ("cp1251", "koi8-u")],
    *[(GREEK, name) for name in ("cp1253", "iso8859-7")],
    *[(JAPANESE, name) for name in ("cp932", "shift_jis", "euc_jp")],
    (KATAKANA, "cp932"),
    *[(CHINESE, name) for name in ("gb18030", "gbk", "gb2312")],
    *[(TAIWANESE, name) for name in ("big5", "cp950")],
    *[(text, "big5") for text in ("三月", "瑞典語", "歷史")],
    ("Найти", "cp1251"),
    *[(KOREAN, name) for name in ("euc_kr", "cp949")],
    ("Türkçe bir cümle yazıyorum, şu ağaç güzel\n", "cp1254"),
    ("שלום לכולם, זה משפט בעברית\n", "cp1255"),
    ("هذه جملة باللغة العربية في ملف\n", "cp1256"),
    ("Šis teikums ir latviešu valodā, un tas ir ļoti vienkāršs, bet ar īpašām zīmēm\n", "cp1257"),
    ("นี่คือประโยคภาษาไทยในไฟล์\n", "tis-620"),
    *[(text, name) for text in (ASCII, GERMAN, RUSSIAN, JAPANESE, CHINESE) for name in ("utf-16-le", "utf-16-be")],
    *[(text, name) for text in (ASCII, "你好", GERMAN) for name in ("utf-16", "utf-32")],
    *[(text, name) for text in (ASCII, GERMAN) for name in ("utf-32-le", "utf-32-be")],
]


def message(content: bytes, **how: object) -> str:
    """The error for a file of this content."""
    try:
        refuse_zero_bytes("in.txt", "", content)
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return str(not_utf8("in.txt", "", content, error.start, **how))
    except UserError as error:
        return str(error)
    raise AssertionError("it is UTF-8")


def converted(content: bytes, explanation: str) -> str:
    """What the command in a message makes of the content, by Python's codec of the name that iconv knows."""
    name, target = re.search(r"convert it with: iconv -f (\S+) -t UTF-8 in\.txt > (\S+)$", explanation).groups()
    assert target == "in.utf8.txt"
    return content.decode(name)


@pytest.mark.parametrize(("text", "encoding"), ENCODED)
def test_the_command_gives_the_text_back(text: str, encoding: str) -> None:
    content = text.encode(encoding)
    explanation = message(content)
    assert converted(content, explanation) == text
    assert ("probably" not in explanation) == encoding.startswith("utf")
    shown = re.search(r"in which it reads '(.+?)'; convert", explanation)[1]
    assert len(shown) <= 40 and shown.strip("…") in text


@pytest.mark.parametrize("encoding", ["cp1252", "cp1250", "utf-16-le"])
def test_the_first_such_byte_may_come_late(encoding: str) -> None:
    text = ASCII * (3 * EXAMINED // len(ASCII)) + GERMAN
    assert converted(text.encode(encoding), message(text.encode(encoding))) == text


def test_a_line_of_any_length_and_what_follows_it() -> None:
    """One accent may be of any encoding; the lines after it decide, and no more of them is read than is looked at."""
    text = "x " * EXAMINED + "é\n" + JAPANESE
    first, rest = text.encode("cp932", "ignore"), []
    first = "表\n".encode("cp932")
    assert "Shift-JIS" in message(first, more=lambda size: rest.append(size) or JAPANESE.encode("cp932"))
    assert rest == [EXAMINED]
    long = ("x " * EXAMINED + GERMAN).encode("cp1252")
    assert "probably Windows-1252, in which it reads" in message(long)


@pytest.mark.parametrize(
    ("content", "explanation"),
    [
        (
            (GERMAN * 20).encode()[:-2] + b"\xc3",
            "it is UTF-8 that ends within a character, so it was cut off; fetch it",
        ),
        ("Größe und Ma".encode() + b"\xc3", "it is UTF-8 that ends within a character"),
        (JAPANESE.encode()[:-2], "it is UTF-8 that ends within a character"),
        (
            GERMAN.encode() + b"one \xff byte\n" + GERMAN.encode(),
            "it is UTF-8 with damaged bytes; fetch it again, or drop",
        ),
        (
            GERMAN.encode().replace(b"\xc3\x9c", b"\x9c"),
            "drop them with: iconv -c -f UTF-8 -t UTF-8 in.txt > in.utf8.txt",
        ),
        (JAPANESE.encode()[1:], "it is UTF-8 with damaged bytes"),
        (
            (GERMAN * 5).encode() + (GERMAN * 20).encode("cp1252"),
            "it is UTF-8 before and probably Windows-1252 from there",
        ),
        (b"a \xed\xa0\xbd\xed\xb8\x80 b\n", "it is UTF-8 except for surrogates, the halves of a character (CESU-8"),
        (b"a\xff\x01\x02\x03\x80\x90\x05\x06", "it is binary, not text"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", "is binary, not text: a zero byte in line 3"),
        (b"caf\xe9\0", "is binary, not text: a zero byte in line 1"),
        (bytes(random.Random(0).choices(range(0x80, 0x100), k=40)), "its encoding was not recognized"),
    ],
)
def test_what_is_no_other_encoding(content: bytes, explanation: str) -> None:
    assert explanation in message(content)


def test_lines_before_that_were_utf8_count() -> None:
    line = b"one \xff byte in a line of ASCII\n"
    assert "damaged" not in message(line)
    assert "damaged" in message(line, earlier=5)


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("my file.txt", "iconv -f WINDOWS-1252 -t UTF-8 'my file.txt' > 'my file.utf8.txt'"),
        ("d/in.txt.gz", "gzip -dc d/in.txt.gz | iconv -f WINDOWS-1252 -t UTF-8 > d/in.utf8.txt"),
        ("in.jsonl.xz", "xz -dc in.jsonl.xz | iconv -f WINDOWS-1252 -t UTF-8 > in.utf8.jsonl"),
        ("-x", "iconv -f WINDOWS-1252 -t UTF-8 ./-x > ./-x.utf8"),
        ("vocab", "iconv -f WINDOWS-1252 -t UTF-8 vocab > vocab.utf8"),
    ],
)
def test_the_command_is_for_the_shell(path: str, command: str) -> None:
    assert explain(b"Gr\xf6\xdfe", 2, path).endswith(command)
