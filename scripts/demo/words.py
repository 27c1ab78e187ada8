"""The words that the made-up dialogues are made of.

About a sixth of them is kept from training, whatever list they stand in, and so is a sixth of all pseudo-words: they
make the tools and entities that the demo is tested on. Verbs are all trained on.
"""

import zlib
from functools import cache
from random import Random

VERBS = {
    "get": ("get", "show me", "give me", "tell me", "look up", "what is", "fetch"),
    "find": ("find", "look for", "find me"),
    "search": ("search for", "search"),
    "list": ("list", "list all of", "enumerate"),
    "check": ("check", "have a look at", "verify"),
    "create": ("create", "make", "set up"),
    "add": ("add", "put in", "insert"),
    "update": ("update", "change", "modify"),
    "delete": ("delete", "remove", "erase"),
    "send": ("send", "send out"),
    "book": ("book", "reserve"),
    "cancel": ("cancel", "call off"),
    "order": ("order", "buy"),
    "schedule": ("schedule", "plan"),
    "track": ("track", "follow"),
    "calculate": ("calculate", "work out", "compute"),
    "convert": ("convert",),
    "compare": ("compare",),
    "count": ("count",),
    "measure": ("measure",),
    "start": ("start", "begin", "launch"),
    "stop": ("stop", "end", "halt"),
    "open": ("open",),
    "close": ("close", "shut"),
    "play": ("play",),
    "print": ("print",),
    "rate": ("rate",),
    "save": ("save", "store"),
    "share": ("share",),
    "translate": ("translate",),
    "summarize": ("summarize", "sum up"),
    "predict": ("predict", "forecast"),
    "validate": ("validate", "confirm"),
    "assign": ("assign",),
    "read": ("read", "read me"),
    "turn_on": ("turn on", "switch on"),
    "turn_off": ("turn off", "switch off"),
}

NOUNS = tuple(
    """account address advice airport alarm album alert animal answer apartment app appointment
    area army
article artist author auction backup badge bag balance ball bank basket battery beach bed bicycle
bill bird board boat body book boss bottle box brand bread bridge brother budget building bus
business cabin cable cake calendar call camera camp car card cargo carpet case castle cat chair
channel chapter charge chart chat church circle city claim class client climate clinic clock club
coach coat code coffee coin college color comment company computer concert contact container
contract cook copy corner cost country coupon course court credit crop crowd currency customer
dance data date deal debt deck degree delivery demand dentist desert design desk detail device diet
dinner discount distance district doctor document dog dollar domain door draft dress drink driver
drug earnings earth economy editor egg elevator email employee energy engine engineer entry error
essay estate event exam exchange expense expert factory fare farm fashion fee festival field file
film filter fine fire fish fitness flag flight floor flower food forecast forest form formula fruit
fuel fund furniture game garage garden gas gate gift glass goal gold grade grant group guest guide
guitar habit hall harbor health heart heater hero history hobby holiday home horse hospital hotel
hour house humidity idea image income index industry insurance interest internet inventory invoice
island item job journal journey juice key kitchen lab lake lamp language laptop law lawyer leader
league lecture lesson letter library license light limit line link list loan location lock logo
lottery lunch machine magazine mail manager map market match meal meeting member memory menu
message metal meter mission model monitor mortgage mountain movie museum music network news note
notice novel number nurse object offer office oil opera option orchestra order outfit oven owner
package page paint painting palace paper park parcel parking partner party passport password
patient pattern payment pension people permit pet phone photo piano picture pilot pipe plane planet
plant plate player playlist podcast poem police policy pollution pool port post poster power
present pressure price printer prize product profile profit program project property protein
province pump quality quarter question queue quiz quote radio rain rank rate receipt recipe record
refund region reminder rent repair report request review reward rice ride ring risk river road
robot role room route rule salary sale salt sample satellite scale schedule school score screen
script sea season seat security sensor series server service session shape share shelf shift ship
shipment shirt shoe shop show shower sign signal singer sister site skill snow soccer society sofa
software soil song sound soup source space speaker speech speed sport square stadium staff stage
stamp star station status steel stock stone storage store storm story street student studio style
subject subscription sugar suit summary supplier supply surface survey symbol system table tariff
task tax taxi tea teacher team tank temperature temple tenant term test text theater thermostat
ticket tide tile timer title toll tool tour tower town toy track trade traffic train transfer
travel treaty tree trend trial trip truck tunnel tv uniform unit user vacation vaccine valley value
vegetable vehicle version video village visa visitor voice volume vote wage wall wallet warehouse
warranty water wave weather website wedding weekend weight wheel wind window wine winner wire word
work workout world worker yard year zone zoo""".split()
)

ADJECTIVES = tuple(
    """active annual average big blue current daily deep digital early extra fast final first free
    fresh
full global good green happy heavy high hourly inner international large last late latest light
local long low main major maximum mean medical minimum monthly national nearest new next old open
outer personal planned private public quick rapid real recent red regional remote rental safe
second short simple small smart social solar special standard static summer sweet thin top total
urban used virtual warm weekly white wide wild winter yearly young""".split()
)

CITIES = tuple(
    """Paris London Berlin Madrid Rome Vienna Lisbon Dublin Oslo Helsinki Stockholm Copenhagen
    Warsaw
Prague Budapest Athens Zurich Geneva Brussels Amsterdam Hamburg Munich Lyon Marseille Milan Naples
Barcelona Seville Porto Tokyo Osaka Kyoto Seoul Beijing Shanghai Singapore Bangkok Hanoi Manila
Jakarta Sydney Melbourne Perth Auckland Delhi Mumbai Chennai Dubai Cairo Lagos Nairobi Accra Tunis
Casablanca Toronto Montreal Vancouver Boston Chicago Denver Seattle Dallas Houston Miami Atlanta
Phoenix Lima Bogota Quito Santiago Montevideo Havana Caracas Brasilia Reykjavik Tallinn Riga
Vilnius Krakow Gdansk Sofia Bucharest Belgrade Zagreb Ljubljana Istanbul Ankara Tbilisi Yerevan
Baku Almaty Zürich Málaga Tromsø Łódź Córdoba Montréal 東京 Киев""".split()
)

NAMES = tuple(
    """Anna Ben Clara David Emma Felix Grace Henry Ivan Julia Karl Laura Maria Noah Olga Paul Rosa
    Simon
Tina Victor Wendy Alice Bob Carol Daniel Elena Frank Gina Hugo Irene Jack Kate Leo Mona Nina Oscar
Peter Rita Sam Tom Uma Vera Walter Yuki Zoe Ahmed Bella Chen Diego Eva Farid Goku Hana Igor Jane
Kofi Lena Marco Nadia Omar Priya Quentin Ravi Sofia Tariq Ursula Wei Ximena Yara Zara""".split()
)

SURNAMES = tuple(
    """Smith Jones Brown Garcia Miller Davis Lopez Wilson Moore Taylor Clark Lewis Walker Hall
    Young King
Wright Green Baker Adams Nelson Hill Campbell Mitchell Roberts Carter Phillips Evans Turner Parker
Collins Edwards Stewart Morris Murphy Cook Rogers Morgan Cooper Reed Bailey Bell Kelly Howard Ward
Cox Diaz Wood Watson Brooks Bennett Gray James Reyes Cruz Hughes Price Myers Long Foster Sanders
Ross Silva Costa Rossi Weber Meyer Novak Kovacs Tanaka Sato Kim Park Nguyen Singh Khan Ali Haddad
Okafor Mensah""".split()
)

COMPANIES = tuple(
    """Apple=AAPL Microsoft=MSFT Tesla=TSLA Amazon=AMZN Google=GOOG Nvidia=NVDA Intel=INTC
    Netflix=NFLX
Adobe=ADBE Oracle=ORCL Boeing=BA Nike=NKE Disney=DIS Pfizer=PFE Visa=V Walmart=WMT Starbucks=SBUX
Ford=F Toyota=TM Sony=SONY Siemens=SIE Airbus=AIR Shell=SHEL Nestle=NESN Samsung=SSNLF Ferrari=RACE
Spotify=SPOT Uber=UBER Zoom=ZM Cisco=CSCO Qualcomm=QCOM Broadcom=AVGO PayPal=PYPL Costco=COST
Chevron=CVX Merck=MRK Honda=HMC Philips=PHG""".split()
)

CHOICES = tuple(
    """small medium large red green blue black white low normal high fast slow economy business
    first
cheap fair expensive easy hard daily weekly monthly celsius fahrenheit metric imperial asc desc
email phone sms pdf csv html json english french german spanish morning noon evening night vegan
vegetarian spicy mild open closed draft final""".split()
)

COLORS = tuple(
    """red green blue black white yellow orange purple brown pink silver golden violet turquoise
    beige""".split()
)

LANGUAGES = tuple(
    """English French German Spanish Italian Portuguese Dutch Swedish Polish Czech Greek Turkish
    Arabic
Hindi Japanese Korean Chinese Russian Finnish Danish Norwegian Hungarian""".split()
)

# Words of the prompts and sentences around the made-up ones. They are often read, and would never
# be copied.
_COMMON = tuple(
    """about add all also and any argument arguments array as ask assist assistant at available be
    below
boolean by calculate call called calling can convert could days description do dollars each enum
error example file find follow following for format from function functions get give given go have
help helpful here hi how hour if in integer into it item items json know list look make may me
message model more must my name named need no not now number object of off on one open or out over
parameter parameters people please property properties provide provided query read request required
respond response result return returns role say schema schemas search see send set show signature
signatures sorry string system tag tags tell text than that the then there this time title to tool
tools type types under use user using valid value values want was way what when where which will
with within without work wrong you your""".split()
)

_ONSETS = tuple("b br c ch d dr f fl g gr h j k l m n p pl r s sh st t tr v w z".split())
_VOWELS = tuple("a e i o u a e i o u ai ee oo".split())
# First and last letter: Latin with accents, Greek, Cyrillic, Chinese
_ALPHABETS = ((0x00D8, 0x017F), (0x03B1, 0x03C9), (0x0410, 0x044F), (0x4E00, 0x9FA5))
_CODAS = ("", "", "", "l", "m", "n", "r", "s", "t", "x")


def is_held_out(word: str) -> bool:
    """Whether a word is kept for the tests: a fixed sixth of all spellings."""
    return zlib.crc32(word.lower().encode()) % 6 == 5


@cache
def split(words: tuple[str, ...], held_out: bool) -> tuple[str, ...]:
    """The words of a list that training sees, or those that it never sees."""
    return tuple(word for word in words if is_held_out(word.split("=")[0]) == held_out)


def draw(random: Random, words: tuple[str, ...], held_out: bool) -> str:
    """One of the words; in training mostly one that is put together of two.

    A few hundred words would be learned by heart. To copy words that it never saw, the demo must have seen many.
    """
    word = random.choice(split(words, held_out))
    kind = random.random()
    if held_out or kind < 0.3 or "=" in word:
        return word
    other = random.choice(split(words, held_out)).lower()
    made = _beside_common(random, word, other) if kind < 0.45 else _blend(random, word, other)
    return word if is_held_out(made) else made


def _blend(random: Random, word: str, other: str) -> str:
    """The beginning of one and the end of another: calendar, pressure: calensure."""
    return (
        word[: random.randint(2, max(len(word) - 1, 2))]
        + other[random.randint(1, max(len(other) - 2, 1)) :]
    )


def _beside_common(random: Random, word: str, other: str) -> str:
    """A common word and another as one: userbank, bankuser; or the common one alone.

    A piece such as "user" or "request" is in every prompt. If it is never copied, it is not when it has to be.
    """
    common = random.choice(_COMMON)
    made = random.choice((common + other, common + other[-3:], word + common, common))
    return made.capitalize() if word[0].isupper() else made


def pseudo_word(random: Random, held_out: bool) -> str:
    """A word of two syllables, or now and then three, that means nothing."""
    while True:
        syllables = (
            random.choice(_ONSETS) + random.choice(_VOWELS)
            for _ in range(random.choice((2, 2, 2, 3)))
        )
        word = "".join(syllables) + random.choice(_CODAS)
        if is_held_out(word) == held_out:
            return word


def foreign_word(random: Random) -> str:
    """A word for training with letters beyond ASCII, of which the tokenizer has only the bytes."""
    while True:
        first, last = random.choice(_ALPHABETS)
        letters = [chr(random.randint(first, last)) for _ in range(random.randint(2, 5))]
        if first == _ALPHABETS[0][0]:  # among plain ones, as in Łódź
            letters = [random.choice((letter, *"aeo", *"lnrst")) for letter in letters * 2]
        word = "".join(letters)
        if not word.isascii() and not is_held_out(word):
            return word
