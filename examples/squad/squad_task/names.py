"""Parts of invented names."""

# As dates write them.
_MONTHS_TEXT = """
January February March April May June July August September October November December
"""
MONTHS = _MONTHS_TEXT.split()

# An invented word is an onset, a middle and an ending: "Trulin".
_ONSETS_TEXT = """
b br c d dr f g gr h k l m n p r s st t tr v w z
"""
ONSETS = _ONSETS_TEXT.split()

_MIDDLES_TEXT = """
al am ar el en er il in ol on or ul un and ost erm
"""
MIDDLES = _MIDDLES_TEXT.split()

_ENDINGS_TEXT = """
a o in ek is or an eth um ay ow ill
"""
ENDINGS = _ENDINGS_TEXT.split()

# Real words that name museums, bridges, families, ...; train and dev take every second one each.
_NAME_WORDS_TEXT = """
eagle falcon raven heron swan wolf tiger lion bear fox otter beaver deer horse dolphin whale salmon trout shark turtle
spider beetle butterfly rabbit badger panther leopard elephant camel monkey crane owl hawk sparrow robin pigeon duck
goose rooster bull willow maple cedar pine elm birch oak ash hazel cherry apple lemon orange olive almond pepper
ginger mint clover thistle lily rose violet iris daisy lotus orchid ivy fern moss cotton barley wheat silver copper
golden crystal diamond ruby emerald amber pearl coral ivory marble granite flint slate winter summer autumn spring
thunder storm rain snow frost cloud sunset dawn midnight moon comet planet saturn jupiter mercury venus mars neptune
apollo atlas phoenix dragon giant wizard castle tower abbey temple palace garden meadow valley canyon desert glacier
island lagoon harbor anchor compass lantern candle mirror ribbon velvet silk crown sword shield arrow hammer wagon
carriage saddle bishop knight queen prince duke baron shepherd hunter miller potter weaver baker carter fisher mason
turner walker porter archer cooper gardner marshall chandler sawyer fletcher foster harper piper singer fiddler
drummer trumpet violin cello opera ballad sonnet fable legend mystery harvest carnival parade jubilee victory liberty
justice harmony wisdom courage fortune destiny horizon summit ridge hollow brook creek delta bay reef shore tide
current breeze
"""
NAME_WORDS = _NAME_WORDS_TEXT.split()
