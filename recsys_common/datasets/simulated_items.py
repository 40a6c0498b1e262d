"""Which items exist in the simulated world, and who is likely to take them?

    catalogue = build(items=1700, seed=1)           # the probabilities that simulated.py speaks of
    titles_and_genres(catalogue, seed=1)            # invented, all different; rows of ITEMS_SCHEMA

Needs: __init__.py
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, count

import numpy as np
import pyarrow as pa

from . import ITEMS_SCHEMA

# What each one moves (the rest is in simulated.py):
HEAD, TAIL = 50, 8.5  # popularity of rank r is exp(-TAIL r / items) / (r + HEAD): Gini, the score of popularity
TREND = 0.8  # log popularity that the newest items win, and the oldest lose, on either side of the middle
SIDE = 0.5  # greatest weight of an item in its second group; more blurs the groups
SEQUEL = 0.3  # chance that an item is a sequel of the one before it in its ring
MISLABELLED = 0.2  # chance that the first listed genre is not the item's home
ITEM_STARS = 0.4  # spread of the quality, in stars

_WORDS = {  # genre: adjectives | nouns
    "Action": "Last Iron Burning Reckless Savage Double | Strike Pursuit Vendetta Bullet Siege Convoy",
    "Adventure": "Lost Hidden Golden Distant Forgotten Wild | Expedition Island Voyage Compass River Temple",
    "Animation": "Little Magic Brave Paper Silver Singing | Robot Fox Balloon Toymaker Penguin Lantern",
    "Children": "Secret Lucky Curious Happy Muddy Sleepy | Treehouse Puppy Holiday Pony Circus Garden",
    "Comedy": "Accidental Perfect Awkward Cheap Terrible Second | Wedding Roommate Mayor Dentist Landlord Reunion",
    "Crime": "Crooked Quiet Dirty Loaded Broken Cold | Heist Alibi Ledger Informer Payroll Safe",
    "Documentary": "Living Unseen Endless Vanishing Common Rising | Glacier Harvest Archive Factory Reef Orchestra",
    "Drama": "Long Fragile Ordinary Bitter Tender Borrowed | Winter Daughter Harbour House Letter Autumn",
    "Fantasy": "Enchanted Ancient Crystal Seventh Thorned Eternal | Crown Dragon Wizard Sword Oath Raven",
    "Film-Noir": "Smoky Crimson Midnight Wicked Narrow Marble | Stranger Avenue Hotel Widow Cigarette Staircase",
    "Horror": "Whispering Crawling Haunted Rotten Buried Cursed | Cellar Doll Manor Mirror Scarecrow Asylum",
    "Musical": "Dancing Velvet Dazzling Swinging Sunny Moonlit | Melody Ballroom Chorus Rhythm Serenade Encore",
    "Mystery": "Missing Locked Thirteenth Sealed Masked Nameless | Guest Manuscript Portrait Clue Lodger Riddle",
    "Romance": "First Sweet Stolen Hopeful Lonely Summer | Kiss Valentine Heart Postcard Train Goodbye",
    "Sci-Fi": "Quantum Orbital Parallel Electric Infinite Solar | Horizon Android Colony Signal Planet Paradox",
    "Thriller": "Deadly Sudden Fatal Hostile Exposed Covert | Witness Passenger Trap Target Code Betrayal",
    "War": "Fallen Red Bravest Ninth Barbed Forsaken | Battalion Bridge Trench Soldier Beachhead Armistice",
    "Western": "Dusty Lonesome High Painted Outlaw Copper | Canyon Sheriff Rider Saloon Stagecoach Mesa",
}
_PLACES = "Ashford Belmora Calder Dunmore Eastwick Glenmoor Harrow Istria Kestrel Larkhall Marlow Norwood"
_NAMES = "Ada Bruno Clara Dmitri Elena Felix Greta Hugo Iris Jonas Kira Leo Mina Nico Olga Pavel"

GENRES = tuple(_WORDS)
NUMERALS = ("", " II", " III", " IV", " V")  # what follows the name of a story in its parts
G = len(GENRES)
GROUP_SHARE = np.linspace(1.5, 0.5, G) / G  # of the items and of the tastes


@dataclass(frozen=True)
class Catalogue:
    """The truth about the items; item_id - 1 is the index."""

    home: np.ndarray  # int64 [items], the taste group
    side: np.ndarray  # int64 [items], the other group
    side_weight: np.ndarray  # float64 [items], against 1 for the home
    p: np.ndarray  # float64 [2 * (1 + G), items]: p(i | all), p(i | group 0), ... at the start, then at the end
    sums: np.ndarray  # float64 [entries], number of the row of p + running sum of its non-zero entries
    sums_item: np.ndarray  # int64 [entries], the items of those entries
    followers: np.ndarray  # int64 [items + 1, 3]; the last row, for "no item yet", holds the index `items`
    quality: np.ndarray  # float64 [items], stars
    newness: np.ndarray  # float64 [items], 0 to 1
    part: np.ndarray  # int64 [items], 0 for a first part, 1 for its sequel, ...
    ring: np.ndarray  # int64 [items], the items as they stand in the rings, ring after ring


def generator(seed: int, *key: int) -> np.random.Generator:
    """One of the independent sources of random numbers that belong to a seed."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def build(items: int, seed: int) -> Catalogue:
    """Draw the truth about `items` items."""
    rng, place = generator(seed, 0), np.arange(items)  # the place in the rings, until by_item() below
    home = np.sort(np.searchsorted(np.cumsum(GROUP_SHARE)[:-1], rng.random(items)))
    starts = (rng.random(items) >= SEQUEL) | (np.diff(home, prepend=-1) > 0)
    part = (place - np.maximum.accumulate(np.where(starts, place, 0))) % len(NUMERALS)
    story = place - part
    age, shared, own, quality = rng.random(items), *rng.standard_normal((3, items))
    popular = shared[story] + own  # the parts of one story are popular together
    newness = np.minimum(age[story], 1.05 - 0.05 * np.bincount(story)[story]) + 0.05 * part  # sequels come later
    side = (home + rng.integers(1, G, items)[story]) % G
    side_weight = SIDE * rng.random(items)[story]

    member = np.zeros((1 + G, items))
    member[0] = 1
    member[1 + home, place] = 1
    member[1 + side, place] = side_weight
    rank = np.argsort(np.argsort(-popular))
    log_weight = -TAIL * rank / items - np.log(rank + HEAD)
    p = np.concatenate([member * np.exp(log_weight + end * TREND * (2 * newness - 1)) for end in (-1, 1)])
    p /= p.sum(1, keepdims=True)
    sums = np.cumsum(p, axis=1)
    sums /= sums[:, -1:]  # every row ends in exactly 1
    row, entry = np.nonzero(p)

    first, end = np.searchsorted(home, home), np.searchsorted(home, home, side="right")
    ring = rng.permutation(items)
    followers = np.stack([ring[first + (place - first + k) % (end - first)] for k in (1, 2, 3)])

    def by_item(values: np.ndarray) -> np.ndarray:
        out = np.empty_like(values)
        out[..., ring] = values
        return out

    return Catalogue(
        *(by_item(values) for values in (home, side, side_weight, p)),
        sums=row + sums[row, entry],
        sums_item=ring[entry],
        followers=np.vstack([by_item(followers).T, np.full((1, 3), items)]),
        quality=by_item(ITEM_STARS * (0.6 * popular / 2**0.5 + 0.8 * quality)),
        newness=by_item(newness),
        part=by_item(part),
        ring=ring,
    )


def titles_and_genres(catalogue: Catalogue, seed: int) -> pa.Table:
    """Rows of `ITEMS_SCHEMA`, sorted by item_id."""
    rng, items = generator(seed, 1), len(catalogue.home)
    label = np.where(rng.random(items) < MISLABELLED, rng.integers(0, G, items), catalogue.home)
    second = np.where(catalogue.side_weight > SIDE / 2, catalogue.side, label)
    dice, titles, listed, used = rng.random((items, 5)).tolist(), [""] * items, [[]] * items, set()
    for item in catalogue.ring:
        part = catalogue.part[item]
        if part == 0:  # the parts that come next share its name and its genres
            story = _name_story(GENRES[label[item]], dice[item], used)
            genres = [GENRES[g] for g in dict.fromkeys((label[item], second[item]))]
        titles[item] = f"{story}{NUMERALS[part]} ({1950 + int(69 * catalogue.newness[item] ** 0.7)})"
        listed[item] = genres
    return pa.table([np.arange(1, items + 1), titles, listed], schema=ITEMS_SCHEMA)


def _name_story(genre: str, dice: list[float], used: set[str]) -> str:
    """Return a name that is not in `used`, as short as can be, and add it there. Dice: 5 numbers in [0, 1)."""
    words = [column.split() for column in (*_WORDS[genre].split("|"), _PLACES, _NAMES)]
    adjective, noun, place, name = (w[int(die * len(w))] for w, die in zip(words, dice, strict=False))
    short = [f"The {adjective} {noun}", f"{adjective} {noun}", f"The {noun} of {place}", f"{name} and the {noun}"]
    turn = int(dice[4] * len(short))
    long = [f"{adjective} {noun} of {place}", f"{name} and the {adjective} {noun}"]
    longest = f"{name} and the {adjective} {noun} of {place}"
    books = (f"{longest}, Book {n}" for n in count(2))
    story = next(title for title in chain(short[turn:], short[:turn], long, [longest], books) if title not in used)
    used.add(story)
    return story
