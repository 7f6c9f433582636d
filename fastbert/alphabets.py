"""Frequencies of non-ASCII letters in languages, and the encodings used for text in these languages.

Each language has its non-ASCII letters, the most frequent first. With the typographic characters common to all
languages, that is enough to recognize the encoding of a line.
"""

import string
from dataclasses import dataclass
from functools import cached_property

# Typographic characters of every language. A character between two letters is a letter or one of JOINING.
FREQUENT = "’“”‘„–…«»—\u00a0"
COMMON = "°·§€•©®™‚›‹×½²³µ±¡¿†‰£¼¾"
WORDS = "àáèéêíóôöåÀÁÈÉÍÓÖÅавиксуояэАВИКСУОЯіїєүήηο"  # words of one letter
JOINING = "’·\u00a0\u00ad"
LISTED = 0.9  # assumed fraction of the non-ASCII letters of a text that are in the list
FREQUENT_EACH = 0.05
COMMON_EACH = 0.005
ANOTHER = 3e-4  # frequency of a letter that is not in the list
SYMBOL = 1e-5  # any other character: a currency sign, a fraction, a box character
RARE = 1e-6  # a character that the language does not use
BROKEN = 1e-7  # bytes that are not a character in the encoding


@dataclass(frozen=True)
class Language:
    """The non-ASCII letters of a language."""

    letters: str
    latin: bool = False
    """True if words mix these letters with those of ASCII."""
    lead: tuple[int, int] = (0, -1)
    """First and last lead byte of the characters in everyday use, in an encoding with two bytes per character."""
    each: float = 0.0
    """Average frequency of one of these characters."""

    @cached_property
    def frequency(self) -> dict[str, float]:
        """Letter or typographic character -> its frequency among the non-ASCII characters."""
        weights = {c: 1 / (rank + 2) for rank, c in enumerate(self.letters)}
        scale = LISTED * (1 - min(1.0, self.each * 3000)) / sum(weights.values())
        frequency = dict.fromkeys(COMMON, COMMON_EACH) | dict.fromkeys(FREQUENT, FREQUENT_EACH)
        for c, weight in weights.items():
            frequency[c] = weight * scale
            if len(c.upper()) == 1:
                frequency.setdefault(c.upper(), weight * scale / 10)
        return frequency


def _latin(*letters: str) -> tuple[Language, ...]:
    return tuple(Language(listed, latin=True) for listed in letters)


WESTERN = _latin(
    "üäößÄÜÖé",  # German
    "éèàêçôûîâùœïëÉÀÈÊÇ",  # French
    "óíáéñúü",  # Spanish
    "ãçáéíóõúêâôà",  # Portuguese
    "àèéùìò",  # Italian
    "äöåé",  # Swedish, Finnish
    "øåæé",  # Danish, Norwegian
    "ëéïóè",  # Dutch
    "íáðóéöúþæý",  # Icelandic
    "àéèóíòçúï·",  # Catalan
    "ëç",  # Albanian
)
CENTRAL = _latin(
    "łąężóśćńź",  # Polish
    "íáéěřčžýšůúťďňó",  # Czech
    "áíéčžýšúťľôňäďó",  # Slovak
    "éáóöőüíúű",  # Hungarian
    "ăîâşţșțéà",  # Romanian
    "čšžćđ",  # Croatian, Serbian, Slovene
)
BALTIC = _latin("ėšųžįąūčę", "āīēšņūļžģčķ", "äõüöšž")
TURKISH = _latin("ıüşğöçİâ")
RUSSIAN = (
    Language("оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфёъ"),
    Language("оанивіетрсклудмпязьбгчйїхжшєщцюфґ"),  # Ukrainian
    Language("аоеинтрсвлдпкмзъягбучйжщхцшфюь"),  # Bulgarian
)
GREEK = (Language("αοιετνσρηκπςμλυόγίάδθέχφήώωύβξζψΐϊϋ"),)
HEBREW = (Language("יוהלאתשרמבנםדקחעפכגטסזצןךףץ"),)
ARABIC = (Language("اليمنتروبدهعةسفحقكجشطصخأإىضذزءثغظؤئآ،؟ً"),)
THAI = (Language("านร่กเงมอ้ยลวดีทสัตะปบคหแิืุจพชขใไผูถโซณ็ำธฉภศษึฐฟ์ๆ"),)
JAPANESE = (
    Language(
        "の、。いたにはをとなしでるがてかこっれすらりくもさまんだあー「」きそうつけどよおせわみめえへやろ・じちばほ"
        "ねぶ日年人一大ご国本中出時見行月者分会後前生ンスルトイラリクッアドタシジレロコマテフムメバサカ（）",
        lead=(0x88, 0x98),
        each=6e-5,
    ),
    Language(  # foreign words and names
        "ーンストルイラクリッアドタシジレロコマテフムメバサカィプグキパデダハウチネオナャ・ェブビョポニソミゼモボセトツの",
        lead=(0x88, 0x98),
        each=6e-5,
    ),
)
CHINESE = (
    Language(
        "的，一。是不了在人有我他这个们中来、上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年“”过发后作里"
        "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实：（）《》",
        lead=(0xB0, 0xD7),
        each=8e-5,
    ),
)
TAIWANESE = (
    Language(
        "的，一。是不了在人有我他這個們中來、上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年「」過發後作裡"
        "用道行所然家種事成方多經麼去法學如都同現當沒動面起看定天分還進好小部其些主樣理心她本前開但因只從想實：（）《》",
        lead=(0xA4, 0xC6),
        each=7e-5,
    ),
)
KOREAN = (
    Language(
        "이다는에의을가고하를은로한지도서기사어대자리인나부해시그정일여수들있라으아니만과제전보장와상적게면세요습거"
        "오구성주었연했우조소공스유경되마동미야년계원생용무중물음방문관것할신합안국학번입모비위내",
        lead=(0xB0, 0xC8),
        each=1e-4,
    ),
)


@dataclass(frozen=True)
class Encoding:
    """A text encoding with its usual name and its names in iconv and Python."""

    title: str
    iconv: str
    codec: str
    languages: tuple[Language, ...]
    prior: float
    """Natural logarithm of its frequency relative to Windows-1252."""
    lead: tuple[int, int] | None = None
    """Overrides `lead` of the language."""


EVERY_LANGUAGE = (
    *(*WESTERN, *CENTRAL, *BALTIC, *TURKISH, *RUSSIAN, *GREEK, *HEBREW, *ARABIC, *THAI),
    *(*JAPANESE, *CHINESE, *TAIWANESE, *KOREAN),
)
UTF8 = Encoding("UTF-8", "UTF-8", "utf-8", EVERY_LANGUAGE, 0, (0xE3, 0xED))  # with damaged bytes
ENCODINGS = (
    UTF8,
    Encoding("Windows-1252", "WINDOWS-1252", "cp1252", WESTERN, 0),
    Encoding("ISO-8859-15 (Latin-9)", "ISO-8859-15", "iso8859-15", WESTERN, -3),
    Encoding("Mac Roman", "MACINTOSH", "mac_roman", WESTERN, -4),
    Encoding("DOS code page 850", "CP850", "cp850", WESTERN, -4),
    Encoding("Windows-1250", "WINDOWS-1250", "cp1250", CENTRAL, -1.5),
    Encoding("ISO-8859-2 (Latin-2)", "ISO-8859-2", "iso8859-2", CENTRAL, -2.5),
    Encoding("Windows-1251", "WINDOWS-1251", "cp1251", RUSSIAN, -1),
    Encoding("KOI8-R", "KOI8-R", "koi8-r", RUSSIAN, -2),
    Encoding("KOI8-U", "KOI8-U", "koi8-u", RUSSIAN, -2),
    Encoding("DOS code page 866", "CP866", "cp866", RUSSIAN, -4),
    Encoding("ISO-8859-5", "ISO-8859-5", "iso8859-5", RUSSIAN, -5),
    Encoding("Shift-JIS (CP932)", "CP932", "cp932", JAPANESE, -1),
    Encoding("EUC-JP", "EUC-JP", "euc_jp", JAPANESE, -2, (0xB0, 0xCF)),
    Encoding("GB18030 (GBK, GB2312)", "GB18030", "gb18030", CHINESE, -1),
    Encoding("Big5 (CP950)", "CP950", "cp950", TAIWANESE, -1),
    Encoding("EUC-KR (CP949)", "CP949", "cp949", KOREAN, -1),
    Encoding("Windows-1253", "WINDOWS-1253", "cp1253", GREEK, -2),
    Encoding("ISO-8859-7", "ISO-8859-7", "iso8859-7", GREEK, -3),
    Encoding("Windows-1254", "WINDOWS-1254", "cp1254", TURKISH, -2),
    Encoding("Windows-1255", "WINDOWS-1255", "cp1255", HEBREW, -2),
    Encoding("Windows-1256", "WINDOWS-1256", "cp1256", ARABIC, -2),
    Encoding("Windows-1257", "WINDOWS-1257", "cp1257", BALTIC, -3),
    Encoding("TIS-620 (Windows-874)", "CP874", "cp874", THAI, -2),
)
ASCII_LETTERS = frozenset(string.ascii_letters)
