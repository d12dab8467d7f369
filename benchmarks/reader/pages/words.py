"""Plain English words, each one piece of the model's vocabulary when a space stands before it."""

from __future__ import annotations

from random import Random
from typing import Iterator, Sequence

NAMES = """Adam Alex Alice Amy Andrew Anna Anthony Ben Bob Brian Carl Carol Charles Chris Clara Daniel
David Diana Edward Emily Emma Eric Eva Frank Fred George Grace Harry Helen Henry Ian Jack James Jane Jim
Joe John Josh Julia Karen Kate Kevin Kim Laura Leo Linda Lisa Louis Lucy Luke Mark Martin Mary Max Michael
Mike Nancy Nick Nina Oliver Oscar Paul Peter Rachel Ray Robert Rose Ruth Ryan Sam Sarah Simon Sophia Steve
Susan Thomas Tim Tom Tony Victor William""".split()
SURNAMES = """Adams Allen Anderson Baker Bell Brown Carter Clark Cook Cooper Davis Edwards Evans Fisher Fox
Gray Green Hall Harris Hill Howard Jackson Johnson Jones King Lee Lewis Martin Miller Moore Morgan Morris
Murray Nelson Parker Phillips Reed Roberts Rogers Russell Scott Smith Stewart Stone Taylor Turner Walker
Ward Watson White Wilson Wood Wright Young""".split()
CITIES = """Amsterdam Athens Atlanta Austin Baltimore Barcelona Berlin Boston Cairo Chicago Cleveland
Dallas Delhi Denver Detroit Dublin Edinburgh Florence Geneva Hamburg Houston Istanbul Jerusalem Lima London
Madrid Manchester Melbourne Miami Milan Montreal Moscow Munich Oslo Oxford Paris Philadelphia Phoenix
Portland Prague Rome Seattle Shanghai Stockholm Sydney Tokyo Toronto Vancouver Venice Vienna Warsaw
Washington""".split()
COUNTRIES = """Argentina Australia Austria Belgium Brazil Canada Chile China Cuba Denmark Egypt England
Finland France Germany Greece Hungary India Indonesia Iran Ireland Israel Italy Japan Kenya Mexico Norway
Pakistan Peru Poland Portugal Russia Scotland Spain Sweden Switzerland Thailand Turkey Ukraine
Vietnam""".split()
JOBS = """actor artist author baker chef dancer dentist doctor driver editor engineer farmer lawyer
mechanic musician nurse painter photographer pilot player poet programmer scientist singer soldier surgeon
teacher writer""".split()
ANIMALS = """bear bird cat cow deer dog dolphin donkey dragon duck eagle elephant fish fox frog goat horse
lion monkey mouse owl pig rabbit rat shark sheep snake spider tiger turtle whale wolf""".split()
SPORTS = """baseball basketball boxing chess climbing cricket cycling fishing football golf hiking hockey
hunting rugby running skating skiing soccer surfing swimming tennis wrestling yoga""".split()
COLORS = "black blue bronze brown gold gray green orange pink purple red silver white yellow".split()
FOODS = """apples bananas beans beef beer berries bread butter cake carrots cereal cheese chicken chips
chocolate coffee cookies corn cream eggs fish flour fruit garlic grapes honey juice lamb lemon lettuce meat
milk mushrooms nuts oats oil onions oranges pasta peas pepper pizza pork potatoes rice salad salmon salt
sauce soup spinach sugar tea tomatoes turkey vinegar water wheat wine yogurt""".split()
THINGS = """bag ball basket bed bell bench bicycle blanket book bottle bowl box brush bucket camera candle
carpet chair clock coat computer couch cup curtain cushion desk dish doll door drum fan fork frame glass
guitar hammer hat helmet jacket jar kettle key keyboard knife ladder lamp lock map mat mirror painting pan
pen pencil phone piano pillow pipe plant plate pot printer radio ring rope rug saw shelf shirt shoe shovel
sink spoon statue stove table tent tool toy tray umbrella vase wallet watch wheel whistle window
wire""".split()
QUALITIES = """big cheap clean dark dry flat heavy huge large light little long narrow new old plain round
sharp short small soft square strong tall thick thin tiny warm wide""".split()
MATERIALS = """brass bronze clay copper cotton glass gold iron leather metal paper plastic rubber silk
silver steel stone wood wool""".split()
EVENTS = """breakfast celebration class concert conference dance debate dinner exam exhibition festival
game interview lecture lesson lunch meeting parade party performance picnic presentation rehearsal
reception review seminar show test tour training walk webinar wedding workshop""".split()
SUBJECTS = """algebra art astronomy biology chemistry drama economics ethics film food geography geometry
grammar health history language law literature mathematics medicine music philosophy physics poetry
politics psychology religion science sociology statistics technology travel""".split()
ROOMS = """attic balcony basement bathroom bedroom cabin chapel corridor courtyard den garage
garden gallery gym hall kitchen laboratory laundry library lobby museum nursery office pantry porch shop
stable stage storage store studio theater tower workshop""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
COMPANIES = """Alpha Apple Arrow Castle Central Crown Crystal Delta Diamond Eagle East Global Golden Grand
Harbor Liberty Lion Metro National North Ocean Pacific Phoenix Pioneer River Royal Silver South Star Summit
Sun Union United Victoria West""".split()
DEPARTMENTS = """Agriculture Design Education Energy Engineering Finance Health Justice Law Marketing
Operations Planning Production Research Safety Sales Security Service Support Training Transportation
Travel""".split()
WEATHER = "clear cloudy cold dry hot mild rainy snowy stormy sunny warm wet windy".split()
SCENES = """The sun was low over the hills and the air was cold.
Nobody knew who had left the gate open.
The road goes along the river to the old mill.
We waited for the train until it was dark.
A boy ran across the field with a letter.
The market opens early and closes at noon.
There was rain for two days and the street was full of water.
She put the book back and looked at the sea.
The bridge is older than the town.
There was music in the street until late at night.
He had never seen so much snow in one place.
The children went home when the bells rang.
Most of the houses here are made of stone.
The boat came back without any fish.
They talked about the harvest and the price of wheat.
In the garden stood a tree that gave no fruit.
My father sold the horse and bought a machine.
The light in the tower was on all night.
You can see the mountains when the sky is clear.
The soldiers sat around the fire and said nothing.""".split("\n")


def pairs(r: Random, first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every (first, second) once, in an order of its own; a first word returns when all others were used."""
    first, second = r.sample(first, len(first)), r.sample(second, len(second))
    for turn in range(len(second)):
        for index, word in enumerate(first):
            yield word, second[(index + turn) % len(second)]


def people(r: Random) -> Iterator[str]:
    """Names and surnames, each person once."""
    return map(" ".join, pairs(r, NAMES, SURNAMES))


def numbers(r: Random, low: int, high: int) -> Iterator[str]:
    """Every number of ``low .. high`` once, in an order of its own."""
    return map(str, r.sample(range(low, high + 1), high + 1 - low))


def price(r: Random) -> str:
    return f"{r.randint(1, 19)}.{r.randint(0, 9)}{r.choice('05')}"


def clock(r: Random) -> str:
    return f"{r.randint(7, 21)}:{r.choice('012345')}{r.choice('05')}"
