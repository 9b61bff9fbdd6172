"""A small set to try retrieval on: thirty passages, three to each topic, and a query for each that shares few words."""

from __future__ import annotations

from typing import Any

import numpy as np

#: A query, and the passage that answers it. The three passages of a topic stand together.
PAIRS: tuple[tuple[str, str], ...] = (
    (
        "famous landmark in France",
        "The Eiffel Tower was built in Paris for the world's fair of 1889.",
    ),
    (
        "how tall is the cathedral in Cologne",
        "The two spires of Cologne's great church rise to 157 metres above the Rhine.",
    ),
    (
        "Roman arena where gladiators fought",
        "Up to fifty thousand people watched men and animals fight in the Colosseum.",
    ),
    (
        "why does cooking take longer at altitude",
        "Water boils at a lower temperature high up in the mountains, since the air pressure is lower.",
    ),
    (
        "why do pipes burst in winter",
        "Unlike most liquids, water takes up more room when it freezes.",
    ),
    (
        "reason for drops on a cold glass",
        "When humid air cools down on a surface, the vapour in it condenses.",
    ),
    (
        "how insects tell each other about food",
        "Bees communicate where flowers are by dancing inside the hive.",
    ),
    (
        "what keeps an ant colony on the same trail",
        "On their way home from a find, ants lay down a scent that their nest mates follow.",
    ),
    (
        "how caterpillars become winged",
        "Inside its chrysalis, the larva of a butterfly is taken apart and built anew within two weeks.",
    ),
    (
        "effect of monetary policy on share prices",
        "The stock market fell sharply after the central bank raised interest rates.",
    ),
    (
        "why does money buy less every year",
        "When more is spent than there are goods, prices go up all over the economy.",
    ),
    (
        "what a company owes the holders of its debt",
        "Whoever buys a bond is paid a fixed coupon twice a year and the face value at maturity.",
    ),
    (
        "recipe for a loaf",
        "To bake bread, knead flour, water, yeast and salt, and let the dough rise before it goes into the oven.",
    ),
    (
        "how to make noodles at home",
        "For fresh pasta, work eggs into flour, let it rest, roll it out thinly and cut it into strips.",
    ),
    (
        "keeping vegetables for months without a fridge",
        "Shredded cabbage that is salted and pressed into a crock turns sour and lasts through the winter.",
    ),
    (
        "who won the football match",
        "The striker scored twice in the second half and the home team won the cup final.",
    ),
    (
        "longest race on foot at the Olympics",
        "Runners of the marathon cover 42.195 kilometres, most of them in more than two hours.",
    ),
    (
        "how a tie is settled on the tennis court",
        "At six games all, the set is decided by a tie-break to seven points.",
    ),
    (
        "protection against disease by injection",
        "A vaccine trains the immune system to recognise a virus before an infection.",
    ),
    (
        "drugs that kill bacteria but not a cold",
        "Antibiotics stop microbes from building their cell walls; against viruses they do nothing.",
    ),
    (
        "what happens when an artery of the heart is blocked",
        "Without oxygen, part of the cardiac muscle dies within hours.",
    ),
    (
        "navigation at sea before modern instruments",
        "Sailors once found their way across the ocean by the position of the stars.",
    ),
    (
        "how a boat gets from the lower to the upper canal",
        "The gates of a lock are closed behind the barge, and the chamber fills with water.",
    ),
    (
        "who tells captains how deep the harbour is",
        "A pilot who knows the shallows comes on board and guides the ship into port.",
    ),
    (
        "why the moon changes its shape",
        "In the course of a month we see more or less of the half of the moon that the sun lights up.",
    ),
    (
        "cause of the dark at noon",
        "When the moon passes right between us and the sun, its shadow sweeps across the earth.",
    ),
    (
        "what a shooting star really is",
        "Grains of dust from comets burn up as they enter the atmosphere.",
    ),
    (
        "undo the last change in version control",
        "git revert makes a commit that takes back what an earlier one did.",
    ),
    (
        "why is my query to the database slow",
        "Without an index, every row of the table has to be read to find a few.",
    ),
    (
        "two threads wait for each other for ever",
        "A deadlock arises where each of two tasks holds the lock that the other one needs.",
    ),
)
QUERIES = [query for query, _ in PAIRS]
PASSAGES = [passage for _, passage in PAIRS]


def ranks(queries: Any, passages: Any) -> Any:
    """Return at which rank, from 1, each query's own passage is, by vectors of length 1, (n_pairs, n_dimensions)."""
    scores = np.asarray(queries) @ np.asarray(passages).T
    return (scores > scores.diagonal()[:, None]).sum(axis=1) + 1
