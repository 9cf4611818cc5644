"""Texts whose vectors tell whether a model does what it should: the same ones wherever asked."""

from __future__ import annotations

from typing import Final

# Unlike each other: languages, scripts, prose, code, a number.
SHORT: Final = (
    "The ferry leaves at seven and takes an hour to reach the island.",
    "def area(width: float, height: float) -> float: return width * height",
    "Die Rechnung ist innerhalb von 14 Tagen ohne Abzug zu bezahlen.",
    "Les champignons poussent mieux après la pluie, dans les sous-bois.",
    "El equipo perdió el partido por un solo gol en el último minuto.",
    "图书馆每周六下午对公众免费开放。",
    "Температура ночью опустится ниже нуля, возможен гололёд.",
    "تُزرع أشجار الزيتون على سفوح الجبال منذ آلاف السنين.",
)

# A paragraph each: what goes wrong with positions and attention shows only over some length.
LONG: Final = (
    "A lighthouse keeper had three duties. At dusk he climbed the stairs, trimmed the wick and lit "
    "the lamp; every four hours he wound the clockwork that turned the lens; and at dawn he drew "
    "the curtains, lest the sun shine through the glass and set the hills behind him on fire. In "
    "the log he wrote the wind, the weather and the ships that passed, one line for each, in ink. "
    "Nothing else was asked of him, and nothing less would do: a single night in which the light "
    "failed could cost more lives than the keeper would meet in all his years on the rock.",
    "Wer einen Garten anlegt, braucht Geduld. Im ersten Jahr wird der Boden gelockert und mit "
    "Kompost verbessert, im zweiten wachsen Kräuter und Salat, und erst im dritten tragen die "
    "Sträucher so viel, dass sich die Arbeit lohnt. Ein Obstbaum gibt noch später zurück, was man "
    "in ihn gesteckt hat; dafür überlebt er oft den, der ihn gepflanzt hat, und seine Kinder.",
    "पहाड़ी गाँवों में बारिश का पानी छतों से इकट्ठा किया जाता है। गर्मियों में जब झरने सूख जाते हैं, तब यही पानी "
    "पीने और सिंचाई के काम आता है, और हर परिवार जानता है कि उसे कितने दिन चलाना है।",
)

ALL: Final = SHORT + LONG
