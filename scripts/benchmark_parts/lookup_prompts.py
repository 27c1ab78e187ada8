"""Prompts for a real chat model: answers that repeat much of the prompt, and answers that do not."""

PASSAGES = (
    "The town library will close for repairs on Monday, 3 March, and open again on Friday, 14 March. "
    "Books that are due in that time may be returned until 21 March without a fee. The reading room "
    "on Mill Street stays open from 9 to 17 o'clock, and children's hour takes place there on both "
    "Wednesdays. The repairs cost 48,000 euros, of which the county pays half. Readers who want to "
    "borrow books during the repairs can order them by telephone and collect them at the town hall.",
    "Honeybees tell each other where flowers are by dancing. A bee that has found food runs in a "
    "straight line across the comb, waggling its body, then circles back and runs again. The angle of "
    "the line to the vertical is the angle between the flowers and the sun, and the length of the run "
    "tells how far away they are: about one second for a kilometre. Other bees follow the dancer in "
    "the dark hive and feel the movement with their antennae before they fly out.",
    "The committee met on Tuesday evening with eight members present. It approved the minutes of the "
    "last meeting and agreed to buy a second projector for the lecture hall for at most 600 euros. "
    "Anna Berg reported that 112 people came to the spring concert, thirty more than last year. The "
    "proposal to move the summer party to August was put to a vote and rejected by five votes to "
    "three. The next meeting is on 12 May at seven o'clock.",
    "A cache keeps copies of what was needed lately close to where it is used. When a program asks for "
    "a value, the cache is searched first; if the value is there, which is called a hit, the slower "
    "memory is not asked at all. If it is not there, the value is read from the slower memory and "
    "stored in the cache, and something else must leave it. Most caches drop what was not used for "
    "the longest time, because programs tend to use again what they used a moment ago.",
)

CODE = (
    (
        "Rename the variable `x` to `total` and return the same function.",
        "def add_prices(items):\n    x = 0\n    for item in items:\n        if item.price is None:\n"
        "            continue\n        x += item.price * item.count\n    return round(x, 2)\n",
    ),
    (
        'Add a parameter `encoding` with the default "utf-8" and use it when the file is opened.',
        "def read_settings(path):\n    settings = {}\n    with open(path) as file:\n"
        '        for line in file:\n            name, _, value = line.partition("=")\n'
        "            settings[name.strip()] = value.strip()\n    return settings\n",
    ),
    (
        "Add a docstring that says what the function returns. Change nothing else.",
        'def longest_word(text):\n    words = text.split()\n    if not words:\n        return ""\n'
        "    longest = words[0]\n    for word in words[1:]:\n        if len(word) > len(longest):\n"
        "            longest = word\n    return longest\n",
    ),
    (
        "Change the class so that the balance starts at the argument `balance` instead of 0.",
        "class Account:\n    def __init__(self, owner):\n        self.owner = owner\n"
        "        self.balance = 0\n\n    def deposit(self, amount):\n        self.balance += amount\n\n"
        "    def withdraw(self, amount):\n        if amount > self.balance:\n"
        '            raise ValueError("not enough money")\n        self.balance -= amount\n',
    ),
)

ORDER = {
    "type": "object",
    "properties": {
        "customer": {"type": "string"},
        "product": {"type": "string"},
        "count": {"type": "integer"},
        "city": {"type": "string"},
    },
    "required": ["customer", "product", "count", "city"],
}
ORDERS = (
    "Please send 12 garden chairs to Margaret Holloway. She lives in Newcastle upon Tyne.",
    "Hello, this is Tomasz Wojciechowski from Gdansk, I would like to order 3 stainless steel kettles.",
    "Order from Bartholomew & Sons, Edinburgh: 250 sheets of watercolour paper, cold pressed.",
    "Could you deliver 7 bags of sunflower seeds to Aoife O'Sullivan in Ballinasloe by Thursday?",
)

QUESTIONS = (
    "Why is the sky blue?",
    "How do I make a cup of tea?",
    "What is the difference between a lake and a pond?",
    "Give me three reasons to learn a second language.",
)
