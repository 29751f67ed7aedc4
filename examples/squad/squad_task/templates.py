"""Topics of the generated questions: domains, their facts, and the wordings of facts and questions.

In each template, `{s}` is the subject (a person, a museum, ...) and `{v}` the value that a question asks for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """A whole number from `low` to `high` and its unit: "340 metres"."""

    low: int
    high: int
    unit: str


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: one word of `first` before one of `second`."""

    first: str
    second: str


@dataclass(frozen=True)
class Fact:
    """One property of a subject.

    Attributes:
        value: what the answer is: "person", "place", "year", "date", a `Number` or a `Phrase`.
        predicates: wordings that follow the subject.
        sentences: wordings with the subject elsewhere.
        questions: wordings for train and dev.
        dev_questions: wordings that only dev uses.
    """

    value: str | Number | Phrase
    predicates: tuple[str, ...]
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    dev_questions: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """Subjects of one kind. `name` is their pattern: `{w}` one of `squad_task.names.NAME_WORDS`, `{p}` a person."""

    title: str
    name: str
    pronoun: str
    facts: tuple[Fact, ...]


DOMAINS = (
    Domain(
        "People and jobs",
        "{p}",
        "",
        (
            Fact(
                "place",
                ("was born in {v}", "grew up in {v}", "comes from {v}"),
                ("{v} is the birthplace of {s}",),
                ("Where was {s} born?", "Which town does {s} come from?"),
                ("In what place did the life of {s} begin?",),
            ),
            Fact(
                Phrase(
                    "marine civil military rural chief night senior",
                    "surgeon engineer painter baker clerk surveyor pilot",
                ),
                ("worked as a {v}", "earned a living as a {v}", "trained to be a {v}"),
                ("The job of {s} was that of {v}",),
                ("What was the profession of {s}?", "What did {s} do for a living?"),
                ("Which occupation did {s} have?",),
            ),
            Fact(
                "person",
                ("married {v}", "was the spouse of {v}"),
                ("{v} became the partner of {s}",),
                ("Who married {s}?", "Who was the spouse of {s}?"),
                ("To whom was {s} married?",),
            ),
            Fact(
                "year",
                ("retired in {v}", "stopped working in {v}"),
                ("The career of {s} ended in {v}",),
                ("When did {s} retire?", "In which year did {s} stop working?"),
                ("What year saw the end of the working life of {s}?",),
            ),
        ),
    ),
    Domain(
        "Expeditions",
        "the {w} expedition",
        "it",
        (
            Fact(
                "person",
                ("was led by {v}", "set out under the command of {v}"),
                ("{v} was in charge of {s}",),
                ("Who led {s}?", "Who commanded {s}?"),
                ("Who was the leader of {s}?",),
            ),
            Fact(
                Number(12, 95, "days"),
                ("lasted {v}", "took {v}"),
                ("It took {v} to complete {s}",),
                ("How long did {s} last?", "How much time did {s} take?"),
                ("What was the duration of {s}?",),
            ),
            Fact(
                "place",
                ("left from {v}", "started at {v}"),
                ("{v} was the starting point of {s}",),
                ("Where did {s} start?", "From which port did {s} leave?"),
                ("What place did {s} depart from?",),
            ),
            Fact(
                Phrase("frozen hidden salt sunken buried stone", "lake harbour temple forest canyon city"),
                ("discovered a {v}", "found a {v}"),
                ("A {v} was discovered by {s}",),
                ("What did {s} discover?", "What was found by {s}?"),
                ("Which discovery was made by {s}?",),
            ),
        ),
    ),
    Domain(
        "Museums",
        "the {w} Museum",
        "it",
        (
            Fact(
                "date",
                ("opened on {v}", "welcomed its first visitors on {v}"),
                ("The doors of {s} opened on {v}",),
                ("When did {s} open?", "On what date did {s} open?"),
                ("What was the opening day of {s}?",),
            ),
            Fact(
                "person",
                ("was designed by {v}", "is the work of the architect {v}"),
                ("{v} drew the plans for {s}",),
                ("Who designed {s}?", "Who was the architect of {s}?"),
                ("By whom was {s} planned?",),
            ),
            Fact(
                Phrase("antique glass paper bronze toy wooden", "clocks masks lanterns maps instruments coins"),
                ("displays {v}", "is known for its {v}"),
                ("Visitors see {v} at {s}",),
                ("What does {s} display?", "What is {s} known for?"),
                ("What can be seen in {s}?",),
            ),
            Fact(
                Number(4, 80, "rooms"),
                ("has {v}", "occupies {v}"),
                ("There are {v} in {s}",),
                ("How many rooms does {s} have?", "How large is {s}?"),
                ("What is the number of rooms in {s}?",),
            ),
        ),
    ),
    Domain(
        "Chemistry",
        "{w} oxide",
        "it",
        (
            Fact(
                Number(110, 990, "degrees"),
                ("melts at {v}", "turns liquid at {v}"),
                ("The melting point of {s} is {v}",),
                ("At what temperature does {s} melt?", "What is the melting point of {s}?"),
                ("How hot must {s} be to become liquid?",),
            ),
            Fact(
                Phrase("pale deep bright dull dark", "red green violet yellow blue orange"),
                ("burns with a {v} flame", "gives off a {v} light"),
                ("A {v} glow is typical of {s}",),
                ("What colour is the flame of {s}?", "With which colour does {s} burn?"),
                ("Which colour does {s} show in a fire?",),
            ),
            Fact(
                "person",
                ("was first prepared by {v}", "was isolated by {v}"),
                ("{v} was the first to produce {s}",),
                ("Who first prepared {s}?", "Who isolated {s}?"),
                ("Which chemist was the first to make {s}?",),
            ),
            Fact(
                Phrase("car rain house watch garden", "paint soap glass batteries pipes mirrors"),
                ("is used to make {v}", "is needed for {v}"),
                ("Makers of {v} depend on {s}",),
                ("What is {s} used for?", "What is made with {s}?"),
                ("Which product needs {s}?",),
            ),
        ),
    ),
    Domain(
        "Sport",
        "{w} Rovers",
        "they",
        (
            Fact(
                "person",
                ("are coached by {v}", "hired {v} as coach"),
                ("{v} is the trainer of {s}",),
                ("Who coaches {s}?", "Who is the trainer of {s}?"),
                ("Which person trains the team of {s}?",),
            ),
            Fact(
                Phrase("river north castle mill market", "park arena field stadium meadow"),
                ("play at the {v}", "have their home at the {v}"),
                ("The {v} is the home of {s}",),
                ("Where do {s} play?", "What is the home of {s}?"),
                ("At which ground can one watch {s}?",),
            ),
            Fact(
                Number(2, 60, "goals"),
                ("scored {v} last season", "finished the season with {v}"),
                ("Fans counted {v} for {s}",),
                ("How many goals did {s} score?", "How often did {s} score last season?"),
                ("What was the goal total of {s}?",),
            ),
            Fact(
                "year",
                ("were founded in {v}", "have existed since {v}"),
                ("The club history of {s} began in {v}",),
                ("When were {s} founded?", "Since what year have {s} existed?"),
                ("In which year was the club {s} created?",),
            ),
        ),
    ),
    Domain(
        "Railways",
        "the {w} line",
        "it",
        (
            Fact(
                Number(11, 480, "kilometres"),
                ("is {v} long", "runs for {v}"),
                ("The length of {s} is {v}",),
                ("How long is {s}?", "What is the length of {s}?"),
                ("Over what distance do trains travel on {s}?",),
            ),
            Fact(
                "place",
                ("ends in {v}", "terminates at {v}"),
                ("{v} is the last stop of {s}",),
                ("Where does {s} end?", "What is the last stop of {s}?"),
                ("In which town is the terminus of {s}?",),
            ),
            Fact(
                Phrase("coal heavy fresh cut iron", "ore timber fish grain stone milk"),
                ("carries {v}", "mainly transports {v}"),
                ("Loads of {v} travel on {s}",),
                ("What does {s} carry?", "What is transported on {s}?"),
                ("Which freight is moved by {s}?",),
            ),
            Fact(
                "date",
                ("was completed on {v}", "saw its first train on {v}"),
                ("Trains have used {s} since {v}",),
                ("When was {s} completed?", "On what day did {s} see its first train?"),
                ("What is the date of completion of {s}?",),
            ),
        ),
    ),
    Domain(
        "Books",
        "the novel {w}",
        "it",
        (
            Fact(
                "person",
                ("was written by {v}", "is by {v}"),
                ("{v} is the author of {s}",),
                ("Who wrote {s}?", "Who is the author of {s}?"),
                ("Whose work is {s}?",),
            ),
            Fact(
                "year",
                ("was published in {v}", "appeared in {v}"),
                ("Readers first bought {s} in {v}",),
                ("When was {s} published?", "In what year did {s} appear?"),
                ("What is the year of publication of {s}?",),
            ),
            Fact(
                "place",
                ("is set in {v}", "takes place in {v}"),
                ("{v} is the scene of {s}",),
                ("Where is {s} set?", "Where does {s} take place?"),
                ("In which town does the story of {s} happen?",),
            ),
            Fact(
                Phrase("blind lonely retired young clever", "sailor teacher gardener thief widow doctor"),
                ("is about a {v}", "tells the story of a {v}"),
                ("A {v} is the hero of {s}",),
                ("What is {s} about?", "Whose story is told in {s}?"),
                ("Who is the main character of {s}?",),
            ),
        ),
    ),
    Domain(
        "Bridges",
        "the {w} Bridge",
        "it",
        (
            Fact(
                Number(35, 960, "metres"),
                ("is {v} long", "has a span of {v}"),
                ("The span of {s} is {v}",),
                ("How long is {s}?", "What is the span of {s}?"),
                ("What distance does {s} cover?",),
            ),
            Fact(
                "year",
                ("was built in {v}", "dates from {v}"),
                ("Workers finished {s} in {v}",),
                ("When was {s} built?", "What year does {s} date from?"),
                ("In which year was {s} finished?",),
            ),
            Fact(
                Phrase("grey cast white red rolled", "granite iron marble brick steel"),
                ("is made of {v}", "consists of {v}"),
                ("Its builders used {v} for {s}",),
                ("What is {s} made of?", "What does {s} consist of?"),
                ("Which material was chosen for {s}?",),
            ),
            Fact(
                "person",
                ("was paid for by {v}", "was a gift of {v}"),
                ("{v} gave the money for {s}",),
                ("Who paid for {s}?", "Who gave the money for {s}?"),
                ("By whom was {s} financed?",),
            ),
        ),
    ),
)
