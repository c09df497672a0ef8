"""Compose distinct, varied chat prompts for self-distillation.

The recipe lets SmolLM2-135M-Instruct answer these prompts and trains a draft adapter on its own answers, so what
matters is variety of subject, form and phrasing.  Every prompt is a hand-written template whose slots are filled from
hand-written lists; nothing is downloaded or copied from a benchmark.

    python recipes/smollm2-135m/prompts.py --out prompts.jsonl --n 16000 --seed 0

Template language (see `fill`):

    {city}         a filler from SLOTS["city"]; the same key repeated in one prompt gives the same value
    {city2}        another filler from the same list, different from {city}
    {^city}        the value with its first letter capitalised
    {:3-9}         a fresh whole number from 3 to 9; {:10-90/5} draws in steps of 5
    {x:3-9}, {x}   a number that is remembered under the name x
    a(n) word      "a word" or "an word", chosen by the word that follows

Fillers may contain slots themselves.
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import NamedTuple


class Prompt(NamedTuple):
    """One user message and the category of the template it came from."""

    category: str
    text: str


def items(text: str) -> tuple[str, ...]:
    """Fillers separated by semicolons; line breaks count as spaces."""
    return tuple(" ".join(part.split()) for part in text.split(";") if part.strip())


def rows(text: str) -> tuple[str, ...]:
    """Fillers separated by line breaks."""
    return tuple(line.strip() for line in text.strip().splitlines())


def blocks(text: str) -> tuple[str, ...]:
    """Paragraphs separated by blank lines; line breaks inside a paragraph count as spaces."""
    return tuple(" ".join(part.split()) for part in text.strip().split("\n\n"))


# ----------------------------------
# Fillers: people, places, things.  Nouns come without an article unless the comment says otherwise.
# ----------------------------------

NAMES = items("""
Aisha; Alejandro; Anders; Anita; Arjun; Ben; Bogdan; Camille; Chen; Chloe; Dalia; Dara; Diego; Dmitri; Eli; Emeka;
Emma; Felix; Fiona; Gabriel; Grace; Hana; Hassan; Hugo; Ibrahim; Imani; Ivan; Jamal; Jasmine; Julia; Kaito; Karim;
Kofi; Lars; Leila; Liam; Lucia; Marcus; Marta; Mateo; Miguel; Mina; Nadia; Nora; Olga; Oliver; Paolo; Petra; Priya;
Ravi; Rosa; Ruth; Sana; Sofia; Stefan; Tessa; Tomas; Uma; Wanda; Wei; Yara; Zoe
""")

SURNAMES = items("""
Abbott; Adeyemi; Bianchi; Campbell; Dubois; Eriksen; Ferreira; Garcia; Gupta; Hansen; Ito; Jensen; Khan; Kim; Kovacs;
Lindqvist; Lopez; Mendes; Moreau; Murphy; Nguyen; Novak; Park; Patel; Petrov; Reyes; Romano; Sato; Silva; Singh;
Torres; Van Dyke; Walsh; Wilson; Yilmaz; Zhang
""")

CITIES = items("""
Accra; Amsterdam; Auckland; Baku; Barcelona; Bergen; Berlin; Boston; Brussels; Budapest; Buenos Aires; Cairo;
Casablanca; Chicago; Cusco; Dakar; Delhi; Dublin; Edinburgh; Geneva; Glasgow; Hamburg; Havana; Helsinki; Istanbul;
Jakarta; Kathmandu; Kyoto; Lagos; Lisbon; Ljubljana; Los Angeles; Manila; Marrakesh; Mexico City; Montreal; Munich;
Nairobi; Naples; Osaka; Oslo; Paris; Porto; Prague; Reykjavik; Riga; Santiago; Seattle; Seoul; Singapore; Sofia;
Sydney; Taipei; Tallinn; Tokyo; Toronto; Vancouver; Venice; Vienna; Wellington; York; Zurich
""")

COUNTRIES = items("""
Argentina; Armenia; Austria; Bangladesh; Belgium; Botswana; Brazil; Cambodia; Canada; Chile; Colombia; Costa Rica;
Croatia; Denmark; Ecuador; Estonia; Ethiopia; Fiji; France; Georgia; Germany; Greece; Guatemala; Hungary; India;
Indonesia; Italy; Jamaica; Japan; Kazakhstan; Kenya; Laos; Lebanon; Madagascar; Malaysia; Mexico; Mongolia; Namibia;
Nepal; New Zealand; Norway; Oman; Pakistan; Peru; Poland; Portugal; Rwanda; Senegal; Slovakia; South Africa; South
Korea; Sri Lanka; Sweden; Switzerland; Thailand; Tunisia; Uganda; Ukraine; Uruguay; Zambia
""")

JOBS = items("""
accountant; actor; archaeologist; architect; baker; beekeeper; blacksmith; bookbinder; carpenter; cartographer;
clockmaker; crossing guard; dairy farmer; detective; diplomat; electrician; film director; firefighter; fishmonger;
florist; forester; gardener; glassblower; goldsmith; hairdresser; ice cream seller; interpreter; judge; juggler;
kindergarten teacher; lawyer; librarian; lighthouse keeper; mail carrier; mathematician; mechanic; mountain guide;
museum curator; night guard; nutritionist; opera singer; optician; paramedic; pastry chef; photographer; pianist;
pilot; poet; potter; puppeteer; referee; sailor; school principal; shepherd; shoemaker; software tester; surgeon;
surveyor; swimming instructor; tax adviser; taxi driver; train conductor; translator; truck driver; violin maker;
waiter; weather presenter; zookeeper
""")

TRAITS = items("""
absent-minded; ambitious; anxious; blunt; brave; bored; cheerful; clumsy; cunning; curious; daydreaming; disgraced;
dramatic; eccentric; exhausted; forgetful; generous; grumpy; homesick; honest; impatient; jealous; kind-hearted;
lonely; lucky; mysterious; nervous; newly hired; optimistic; overworked; patient; proud; reckless; retired; sarcastic;
shy; sleepy; stubborn; superstitious; undercover; unlucky; wise; witty; young
""")

ANIMALS = items("""
alpaca; ant; bat; beaver; blackbird; bumblebee; caterpillar; chameleon; cow; crab; crocodile; dolphin; donkey; duck;
eagle; falcon; ferret; firefly; fox; frog; giraffe; goat; goose; grasshopper; hedgehog; heron; hippo; hummingbird;
iguana; kangaroo; kingfisher; ladybird; lemur; llama; magpie; meerkat; moose; moth; narwhal; octopus; otter; owl;
panda; peacock; pelican; pigeon; porcupine; rabbit; raccoon; reindeer; rhinoceros; robin; seahorse; seal; snail;
sparrow; squirrel; starfish; swan; toad; tortoise; walrus; wasp; wolf; woodpecker; zebra
""")

OBJECTS = items("""
accordion; alarm clock; apron; backpack; birdcage; blank postcard; bookmark; broken compass; broom; bucket; camera;
candle; coffee mug; comb; cracked mirror; deck of cards; diary; doorknob; fan; feather; flashlight; flute; fountain
pen; glass marble; gold coin; guitar; hourglass; ice skate; jigsaw piece; kettle; kite; lantern; left shoe; lighter;
lunch box; magnifying glass; matchbox; music box; needle; old photograph; paintbrush; pebble; piano; pillow; pumpkin;
puppet; radio; ring; rocking chair; rusty nail; sandwich; scarf; silver spoon; snow globe; suitcase; telescope; tennis
ball; ticket stub; toaster; toy train; typewriter; umbrella; unopened letter; violin; walking stick; wristwatch
""")

# With an article.
PLACES = items("""
an abandoned amusement park; an airport at midnight; an attic full of boxes; an Arctic research station; a bakery
before dawn; a bamboo forest; a bus station; a canal boat; a castle library; a cave behind a waterfall; a closed
theatre; a coal-mining town; a crowded train carriage; a desert motel; a dusty bookshop; a fishing village; a flooded
valley; a floating island; a forgotten greenhouse; a frozen lake; a futuristic hospital; a ghost town; a glass tower; a
hilltop monastery; a hospital waiting room; an ice cream parlour; a jazz club; a laundromat; a lighthouse in a storm; a
lunar colony; a medieval inn; a museum after closing time; an office on a Sunday; an old cinema; a paper mill; a pirate
ship; a post office in the mountains; a quiet suburb; a railway station in winter; a rooftop garden; a ruined temple; a
sailing boat; a school during the holidays; a secret laboratory; a skyscraper lift; a small airport; a snowed-in
village; a spice market; a stone bridge; a submarine; a sunflower field; a swimming pool in autumn; a tea house; a toy
workshop; a traffic jam; an underground car park; an underwater hotel; a vineyard; a windmill; a wooden pier
""")

GENRES = items("""
adventure; comedy; cosy mystery; crime; cyberpunk; detective; dystopian; fantasy; ghost; gothic; historical; horror;
magical realist; mystery; noir; psychological; romance; satirical; slapstick; spy; steampunk; survival; suspense;
western
""")

# Subjects for poems, speeches and conversations.
THEMES = items("""
first love; losing a friend; moving to a new city; growing old; an empty house; the last day of summer; a forgotten
birthday; the sound of the sea; homesickness; a long train journey; the fear of failure; waiting for a letter; the
first snow; silence; a missed phone call; hope after a hard year; friendship between strangers; autumn leaves; the
passing of time; being left-handed; insomnia; the joy of cooking; an old tree; saying goodbye; second chances; the
colour blue; the morning commute; small acts of kindness; loneliness in a crowd; the moon; a broken promise; the weight
of a secret; coming home; freedom; gratitude; jealousy; wildflowers; coffee; a rainy Monday; thunderstorms; starting
over; courage; the city at night; an unfinished painting; nostalgia; a garden in spring; climate change; the first day
of school; trust; being bored; an empty playground; the kindness of strangers; fame; a stolen bicycle; stage fright;
the end of a holiday; dreams; neighbours; a lost language; technology and memory; old photographs; ambition
""")

VIRTUES = items("""
patience; honesty; greed; pride; sharing; listening; courage; kindness; vanity; hard work; laziness; teamwork;
gratitude; curiosity; jealousy; forgiveness; loyalty; humility; generosity; impatience; planning ahead; keeping
promises; telling the truth; trusting others; judging by appearances; asking for help; learning from mistakes;
selfishness; respect; moderation; hope; stubbornness; friendship; gossip; boasting; being different; sticking to a plan
""")

# A clause after "who" or "in which someone ...".
DEEDS = items("""
forgets how to lie; can hear what plants think; wakes up in the wrong century; inherits a haunted piano; loses the
ability to read; wins a contest by accident; finds a map in a library book; must deliver a letter before sunrise;
becomes famous overnight; meets an older self; saves a village from a flood; hides a dragon in the cellar; learns to
fly; falls in love with a rival; wants to cross the sea; breaks an ancient rule; discovers a door that was not there
yesterday; trades shadows with a stranger; gets lost in the fog; can stop time for ten seconds; receives a mysterious
phone call every night; steals something worthless; builds a boat in the desert; organises a strange parade; solves a
crime nobody noticed; teaches a robot to dream; writes letters to the moon; runs the last bookshop on Earth; has one
day to apologise; cannot stop singing; finds a lost child; speaks only in questions; swaps lives with a neighbour;
grows a giant vegetable; must choose between two homes; mistakes a king for a servant; makes a bad bargain; returns
after twenty years; paints pictures that come alive; keeps a secret too long; opens a restaurant for ghosts; befriends
an enemy; looks for the end of a rainbow; chases a runaway train; hates birthdays; wants to retire
""")

HOBBIES = items("""
astronomy; baking bread; beekeeping; birdwatching; bouldering; calligraphy; camping; candle making; ceramics; choir
singing; collecting stamps; community theatre; crochet; crossword puzzles; cycling; drawing; family history research;
fermenting vegetables; fishing; flower arranging; folk dancing; gardening; geocaching; hiking; home brewing; ice
skating; jogging; journaling; karate; kayaking; keeping an aquarium; knitting; landscape photography; leatherwork;
magic tricks; meditation; metal detecting; model railways; mountain biking; open-water swimming; painting watercolours;
playing the drums; playing the ukulele; podcasting; quilting; restoring furniture; rock climbing; rowing; sailing;
salsa dancing; scrapbooking; sewing; sketching; soap making; squash; stargazing; stop-motion animation; table tennis;
tai chi; trail running; urban gardening; video editing; volunteering; weightlifting; writing short stories; yoga
""")

BUSINESSES = items("""
bakery; bicycle repair shop; board game cafe; book club; boat rental company; bouncy castle rental; cat cafe; cheese
shop; children's theatre; climbing gym; coffee roastery; community garden; cooking school; co-working space; craft
brewery; dance studio; dental clinic; dog grooming salon; driving school; escape room; farm shop; flower shop; food
truck; furniture workshop; guesthouse; hair salon; hardware store; hiking tour company; home cleaning service; ice
cream van; jewellery studio; juice bar; language school; laundry service; mobile library; moving company; music school;
noodle bar; online tutoring service; organic farm; pet hotel; photo studio; pizzeria; pottery studio; public library;
record store; recycling start-up; sailing club; second-hand clothes shop; solar panel installer; swimming school;
tailor's shop; tea house; toy shop; vegan restaurant; veterinary clinic; video game studio; wedding planning agency;
wine bar; yoga studio
""")

PRODUCTS = items("""
adjustable standing desk; air fryer; bamboo cutting board; bluetooth speaker; camping stove; coffee grinder; cordless
drill; cotton hammock; desk lamp; digital piano; dog harness; e-book reader; electric scooter; espresso machine;
fitness tracker; foldable bicycle; folding chair; garden hose; gaming keyboard; glass teapot; hair dryer; hand blender;
hiking backpack; ice cream maker; indoor herb garden; inflatable kayak; insulated lunch bag; juicer; kitchen scale;
laptop stand; leather wallet; memory foam pillow; mini projector; mosquito net; noise-cancelling headset; office chair;
paper planner; pasta maker; phone case; portable charger; pressure cooker; rain jacket; rice cooker; robot vacuum;
rowing machine; salad spinner; security camera; sleeping bag; solar lantern; stainless steel water bottle; sun hat;
toaster oven; travel pillow; travel umbrella; two-person tent; vacuum flask; weighted blanket; wireless mouse; wool
sweater; yoga mat
""")

GADGETS = items("""
bluetooth speaker; cordless drill; desk lamp; e-book reader; electric scooter; electric toothbrush; fitness tracker;
hand blender; mini projector; portable charger; robot vacuum; solar lantern; wireless headset; wireless mouse
""")

GOODS = items("""
apples; bananas; bars of soap; batteries; beads; bagels; bottles of juice; boxes of cereal; bricks; buttons; cakes;
candles; cards; carrots; chairs; coins; comics; cookies; cupcakes; eggs; envelopes; erasers; flower pots; folders; glue
sticks; jars of honey; keyrings; lamps; lemons; light bulbs; magazines; mangoes; markers; marbles; muffins; mugs;
notebooks; onions; oranges; pancakes; peaches; pencils; pens; plates; postcards; posters; potatoes; rulers; sandwiches;
scarves; seashells; shirts; spoons; stamps; tickets; tiles; tomatoes; towels; toy cars; tulips
""")

DAYS = items("Monday; Tuesday; Wednesday; Thursday; Friday; Saturday; Sunday")
MONTHS = items("January; February; March; April; May; June; July; August; September; October; November; December")
COLORS = items("red; blue; green; yellow; purple; white; black; pink; grey; brown; turquoise; silver")
LANGUAGES = items("""
French; Spanish; German; Italian; Portuguese; Dutch; Polish; Swedish; Turkish; Japanese; Chinese; Korean; Hindi; Latin;
Danish; Greek; Czech; Indonesian
""")

AUDIENCES = items("""
a ten-year-old; a curious teenager; my grandmother; a complete beginner; someone with no science background; a busy
manager; a class of eight-year-olds; a first-year university student; a visitor from another planet; a new employee; an
English learner; a five-year-old; a high school student; a farmer; a journalist; an artist; a sceptical friend; a
retired engineer
""")

# ----------------------------------
# Fillers: work and writing.
# ----------------------------------

# After "an email ...".
EMAIL_AIMS = items("""
asking for an extension on a report; declining a wedding invitation politely; thanking a colleague for covering a
shift; apologising for a late delivery; asking a landlord to fix a leaking tap; following up after a job interview;
requesting a refund for a damaged parcel; inviting clients to an open day; announcing a new office dress code;
reminding the team about the fire drill; asking a professor for a recommendation letter; complaining about a noisy
hotel room; introducing a new team member; cancelling a gym membership; asking a supplier for a quotation; rescheduling
a dentist appointment; congratulating a friend on a promotion; proposing a four-day work week; asking for feedback on a
draft; explaining a billing mistake to a customer; requesting a day off; welcoming volunteers to a charity run; chasing
an unpaid invoice; asking the city council to repair a pavement; turning down a job offer; asking to work from home
twice a week; inviting an old classmate to a reunion; apologising for missing a meeting; requesting access to a shared
folder; offering help to a neighbour who is moving; asking parents to join a school trip; asking for a pay rise; giving
notice to end a flat rental; asking a museum about group discounts; thanking a host family; reporting a lost suitcase
to an airline; suggesting a merger of two weekly meetings; warning staff about phishing messages; asking a hotel about
wheelchair access; inviting a guest speaker to a conference
""")

OCCASIONS = items("""
a retirement party; a best friend's wedding; a school graduation; a company's tenth anniversary; a grandmother's
ninetieth birthday; the opening of a new library; a charity dinner; a football team's victory; a farewell lunch; a
science fair; a housewarming party; the launch of a mobile app; a town hall meeting; a memorial service; an awards
ceremony; a school reunion; a volunteer appreciation day; a sister's engagement; a chess tournament; a book launch; a
village festival; a safety training day; a student council election; the unveiling of a statue; a parents' evening; an
art exhibition; a naming ceremony; a tree-planting day; a New Year's Eve party; a baby shower; a charity bake sale; a
marathon finish; an orchestra's first concert; a golden wedding anniversary; a start-up pitch night; a community
clean-up
""")

BLOG_TOPICS = items("""
growing tomatoes on a balcony; working from home with toddlers; saving money on groceries; waking up early; learning to
drive at forty; decluttering a small flat; living without a car; keeping houseplants alive; making friends as an adult;
reading more books; preparing for a job interview; running in winter; adopting an older dog; cooking for one; quitting
social media; travelling by night train; planning a cheap wedding; studying abroad; composting in the city; buying
second-hand furniture; sleeping better; learning sign language; negotiating rent; starting a podcast; caring for ageing
parents; writing a first novel; switching careers; saving water at home; raising bilingual children; meal planning;
painting a room; visiting museums for free; being a good listener; avoiding burnout; starting a vegetable garden;
freelancing; public speaking; taking better photos with a phone; making bread without a machine; dealing with jet lag;
choosing a university course; hosting a dinner party; teaching children about money; keeping a journal; reducing
plastic waste; surviving group projects; birdwatching in the city; learning an instrument late in life; organising a
street party; fixing a bicycle
""")

NEWS = items("""
the bridge will close for repairs; a new bus line will start running; the school kitchen switched to local food;
volunteers planted five hundred trees; the museum found a forgotten painting; a storm cut power to the old town; the
library will open on Sundays; a local baker won a national prize; the swimming pool raised its prices; the factory
announced new jobs; the council voted to ban cars near schools; a rare bird nested on the town hall; students built a
solar-powered boat; the hospital opened a new ward; a film crew will shoot a series in the harbour; the river flooded
the football pitch; the market moved to a new square; a lost dog returned after three years; the train station received
an award; a choir of pensioners released an album; scientists measured a record temperature; the zoo welcomed twin
pandas; a start-up turned coffee grounds into furniture; the orchestra cancelled its tour; an old cinema was saved by
donations
""")

ROLES = items("""
a ship's captain in the age of sail; a medieval herbalist; a museum guide; a grumpy wizard; a time traveller from the
year 2300; a patient piano teacher; a private detective in the 1940s; a Roman soldier on Hadrian's Wall; a sports
commentator; a career counsellor; a strict grammar teacher; a city planner; a customer service agent for an airline; a
personal trainer; a wise old turtle; an astronaut on a space station; a financial adviser for students; a chef in a
tiny restaurant; a job interviewer; a vampire who is afraid of blood; a robot butler; a park ranger; a Viking trader; a
kindergarten teacher; a bee in a busy hive; a weather forecaster; a debate coach; a tour guide in ancient Athens; a
sceptical scientist; a motivational speaker; a wine merchant; a village blacksmith; a gardener with fifty years of
experience; a dragon who collects books; a mystery novelist; a stubborn mule; a nervous bank robber; an old oak tree; a
train that is always late; a court jester; a smartphone from 2009; a nutritionist; a snowman in March; a local
historian; a puzzle master; a fashion designer; a deep-sea diver; a poet who hates rhymes; a translator at a royal
court; the last dinosaur; a museum statue; a speech therapist; a film critic; a coach of a losing football team; a
beekeeper; a fortune teller who is always wrong; a cartographer in 1520; the Moon; a raindrop; a librarian of a magical
library; a chess grandmaster; a monk who brews beer
""")

# After "Tell me" or "explain", said by a character.
ROLE_ASKS = items("""
how your day usually begins; what you had for breakfast; what worries you most; why you chose this life; what you would
change about the world; your strangest encounter; the best advice you ever received; what you think of modern music;
how to stay calm in a crisis; what makes a good friend; your biggest regret; how you spend a rainy afternoon; what you
see from your window; how to choose a present; what happiness means to you; how to learn something difficult; what you
fear; how to prepare for a long journey; your favourite season; what the future will look like; how to apologise
properly; why people argue; what you do when nobody is watching; how to tell a good story; your opinion of smartphones;
what you would do with a million dollars; how you met your best friend; which food you could never give up; what you
learned this week; how to make a stranger laugh; the secret of a long life; how you deal with difficult customers; what
you would say to a king; how to sleep well; your plan for tomorrow; what beauty is; how to start a conversation
""")

# ----------------------------------
# Fillers: knowledge.
# ----------------------------------

STEM = items("""
osmosis; plate tectonics; the greenhouse effect; the Doppler effect; nuclear fusion; radioactive decay; surface
tension; the water cycle; the nitrogen cycle; mitosis; the immune response; enzyme activity; gene editing; antibiotic
resistance; the food chain; bioluminescence; hibernation; echolocation; pollination; cellular respiration; the nervous
system; blood clotting; soil erosion; ocean acidification; tidal forces; red giants; the Big Bang; dark matter;
gravitational waves; eclipses; escape velocity; centripetal force; momentum; buoyancy; air pressure; thermal expansion;
heat conduction; latent heat; specific heat capacity; refraction; polarised light; resonance; sound absorption;
electrical resistance; semiconductors; static electricity; alternating current; half-life; covalent bonds; hydrogen
bonding; catalysis; oxidation; distillation; crystallisation; chromatography; polymers; the periodic table; prime
numbers; logarithms; derivatives; complex numbers; standard deviation; the normal distribution; conditional
probability; hypothesis testing; matrix multiplication; graph theory; binary numbers; encryption; hashing; data
compression; neural networks; gradient descent; decision trees; cloud computing; load balancing; caching; fermentation;
desalination; geothermal energy; carbon capture; fibre optics; 3D printing; the scientific method; monsoons; El Nino;
jet streams; coral bleaching; volcanic eruptions; earthquakes; fossil formation; stem cells; DNA replication;
epigenetics; circadian rhythms; muscle fatigue
""")

# Clauses after "why".
WHY_FACTS = items("""
ice floats on water; leaves change colour in autumn; the moon has phases; metal feels colder than wood; onions make
people cry; stars twinkle; cats purr; bread rises; soap removes grease; balloons stick to walls after rubbing; we see
lightning before we hear thunder; popcorn pops; birds fly in a V shape; rubber bands snap back; bees dance; honey does
not spoil; salt melts ice; mirrors reverse left and right; the sky turns red at sunset; boats made of steel float;
deserts get cold at night; cut apples turn brown; wool keeps us warm; planets are round; we yawn; fingers wrinkle in
water; dogs pant; a straw looks bent in a glass; airplanes leave white trails; milk boils over; diamonds sparkle; ears
pop on a plane; spiders do not stick to their webs; rivers bend; sunflowers face the sun; rust forms on iron; hot air
rises; we need sleep; cacti have spines; whales sing; the days are longer in summer; candles go out in a closed jar;
some people sneeze in bright light; flamingos are pink; tea cools faster in a wide cup; pencils write; tides rise and
fall; salmon swim upstream; snow muffles sound; geckos can walk on walls; the wind blows; owls hunt at night; bridges
have gaps in the road; winter coats trap heat; chameleons change colour; glass is transparent
""")

DEVICES = items("""
barometer; battery; bicycle gear; camera lens; catapult; ceiling fan; combustion engine; compass; computer mouse;
credit card chip; digital camera; electric guitar; elevator; escalator; fax machine; fire extinguisher; fridge; gas
boiler; hearing aid; heat pump; helicopter; hot-air balloon; hydraulic press; induction cooker; inkjet printer; LED
lamp; lie detector; lock and key; loudspeaker; mechanical watch; metal detector; microphone; microwave oven; music
synthesizer; nuclear reactor; pacemaker; parachute; pendulum clock; piano; pressure cooker; quartz watch; radar system;
radio telescope; rain gauge; search engine; sewing machine; smoke detector; solar panel; spell checker; stapler; steam
turbine; submarine; telescope; thermometer; thermos flask; toilet cistern; touch screen; traffic light sensor;
transformer; water tower; wind turbine; zip
""")

EVENTS = items("""
the French Revolution; the fall of Constantinople; the Black Death; the Industrial Revolution; the signing of Magna
Carta; the moon landing; the Russian Revolution; the Great Depression; the partition of India; the fall of the Berlin
Wall; the Boxer Rebellion; the Haitian Revolution; the Meiji Restoration; the American Civil War; the Cuban Missile
Crisis; the Suez Crisis; the Spanish Armada; the Battle of Hastings; the Punic Wars; the unification of Germany; the
unification of Italy; the Irish Potato Famine; the Great Fire of London; the invention of printing; the eruption of
Vesuvius; the Mongol invasions; the Crusades; the Protestant Reformation; the Thirty Years' War; the Treaty of
Versailles; the Marshall Plan; the Spanish Civil War; the Congress of Vienna; the Boston Tea Party; the abolition of
slavery in Britain; the California Gold Rush; the construction of the Panama Canal; the women's suffrage movement; the
Salt March; the end of apartheid; the Prague Spring; the Chernobyl disaster; the Apollo programme; the oil crisis of
1973; the Dutch tulip mania; the Hundred Years' War; the Enlightenment; the Italian Renaissance; the Scramble for
Africa; the Gallipoli campaign; the Battle of Waterloo; the Glorious Revolution; the Norman conquest of England; the
Bandung Conference; the Silk Road trade; the Harlem Renaissance; the Prohibition era; the New Deal; the Velvet
Revolution; the Green Revolution
""")

FIGURES = items("""
Marie Curie; Ada Lovelace; Nelson Mandela; Cleopatra; Florence Nightingale; Charles Darwin; Frida Kahlo; Galileo
Galilei; Mahatma Gandhi; Jane Austen; Simon Bolivar; Rosa Parks; Isaac Newton; Ibn Battuta; Confucius; Aristotle;
Hypatia; Johann Sebastian Bach; Catherine the Great; Marco Polo; Nikola Tesla; Emily Dickinson; Rachel Carson;
Alexander the Great; Louis Pasteur; Ludwig van Beethoven; Amelia Earhart; Vincent van Gogh; Wangari Maathai; Niels
Bohr; Johannes Gutenberg; Johannes Kepler; Rosalind Franklin; Mary Shelley; Miguel de Cervantes; Pablo Neruda;
Rabindranath Tagore; Sun Yat-sen; Toussaint Louverture; Ernest Shackleton; Roald Amundsen; Gregor Mendel; Alfred Nobel;
Alexander Fleming; Harriet Tubman; Eleanor Roosevelt; Maria Montessori; Murasaki Shikibu; Mansa Musa; Akbar; Suleiman
the Magnificent; Antoni Gaudi; Claude Monet; Dmitri Mendeleev; Katherine Johnson; Lise Meitner; Franz Kafka; Chinua
Achebe; Hokusai; Clara Schumann
""")

SOCIAL = items("""
opportunity cost; supply and demand; moral hazard; price elasticity; the tragedy of the commons; sunk costs; monopoly
power; the business cycle; central banking; quantitative easing; public goods; externalities; microfinance; game
theory; universal basic income; diminishing returns; federalism; the separation of powers; habeas corpus; the
presumption of innocence; contract law; copyright; the burden of proof; civil disobedience; proportional
representation; the social contract; natural rights; utilitarianism; virtue ethics; existentialism; stoicism; nihilism;
scepticism; free will; the mind-body problem; the trolley problem; Plato's cave; Occam's razor; cultural relativism;
nationalism; feudalism; mercantilism; liberalism; secularism; globalisation; soft power; deterrence; diplomatic
immunity; feminist theory; oral tradition; myth and ritual; modernism; surrealism; impressionism; baroque music;
tragedy; magical realism; the sonnet form; stream of consciousness; unreliable narrators; confirmation bias; cognitive
dissonance; groupthink; attachment theory; operant conditioning; social mobility; the placebo effect; censorship
""")

# Bare infinitives after "how to" or "how do I".
HOWTO = items("""
remove a red wine stain from a carpet; fold a fitted sheet; sharpen a kitchen knife; unclog a sink without chemicals;
descale a kettle; write a will; pack a suitcase for a week; iron a shirt; prune a rose bush; repot a houseplant;
jump-start a car; tie a bow tie; pick a ripe watermelon; read a nutrition label; get rid of fruit flies; build a snow
shelter; start a campfire; back up a laptop; organise a small wardrobe; wash a wool sweater; paint a wooden fence; hang
a heavy picture; train a puppy to sit; introduce two cats to each other; trim a cat's claws; plan a birthday party on a
small budget; remember people's names; give a good toast; take notes in a lecture; study for a maths exam; write a
cover letter; split bills with flatmates; set up a monthly budget; pay off a credit card; spot a phishing email; clean
a phone screen; cancel a subscription; end a phone call politely; calm a crying baby; teach a child to tie shoelaces;
help a child with homework; use chopsticks; poach an egg; cook rice without a rice cooker; make cold brew coffee;
freeze leftovers safely; plant a lemon tree from seed; water plants during a holiday; save electricity in winter;
remove a splinter; treat a mild sunburn; stretch before a run; breathe while swimming front crawl; sew on a button;
learn to touch-type; speed up an old computer; take a passport photo at home; move house with a cat; choose a birthday
present for a colleague; keep a lawn green in summer; clean windows without streaks; make a bed quickly; defrost a
freezer; measure a room for new flooring; assemble flat-pack furniture; catch a spider safely
""")

GOALS = items("""
run a half marathon; read thirty books this year; stop biting my nails; save five thousand dollars; learn Portuguese
before a trip; wake up at six; drink less coffee; learn to cook; build a small website; become more confident; make new
friends in a new town; get a promotion; spend less time on my phone; lose a few pounds; write a novel; start a small
online shop; learn to swim; sleep eight hours a night; eat more vegetables; improve my handwriting; pass my driving
test; become a vegetarian; reduce my stress; quit smoking; learn the guitar; buy my first home; go back to university;
walk ten thousand steps a day; keep my flat tidy; remember birthdays; meditate every day; speak up in meetings; become
a morning person; plan my retirement; get better at chess; train for a long bike tour; grow my own food; pay off my
student loan; learn to draw; be on time; become a nurse; change careers at forty; find a mentor; improve my posture; do
my first pull-up
""")

# First-person clauses.
PROBLEMS = items("""
my neighbour plays loud music at night; my roommate never washes the dishes; I keep forgetting my keys; I feel tired
every afternoon; my boss sends emails at midnight; my best friend stopped answering my messages; I always spend my
salary in two weeks; my houseplants keep dying; I cannot concentrate at work; I argue with my sister about money; my
dog barks when I leave; I get nervous before presentations; my internet is slow in the evening; I have nothing to wear
to a wedding; I am afraid of flying; my colleague takes credit for my ideas; I find it hard to fall asleep; I was
rejected after a job interview; my daughter only eats pasta; my knees hurt after running; I procrastinate before every
exam; my flat is too small for two people; my partner hates my cooking; I never finish the books I start; I lost my
passport abroad; my cat scratches the sofa; I said something rude to a friend; my parents dislike my career choice; my
car makes a strange noise; I forgot a friend's birthday; my landlord ignores my calls; I eat too many sweets; I get
distracted by my phone; my team misses every deadline; my kitchen smells of fish; I am too shy to join a club; my
garden is full of slugs; my grandfather feels isolated; my teenager sleeps until noon; my bike was stolen; I keep
getting colds; I am bored with my job; I get lost everywhere; my shoes smell terrible; I cannot say no to people; I
have too many unread emails
""")

# "A / B": both sides fit "A and B", "A or B" and "A versus B".
PAIRS = items("""
tea / coffee; renting a flat / buying one; paper books / e-books; city life / country life; cats / dogs; online classes
/ classroom teaching; electric cars / petrol cars; gas cookers / induction cookers; cash / cards; summer holidays /
winter holidays; team sports / individual sports; morning workouts / evening workouts; camping / staying in hotels;
freelancing / a permanent job; cooking at home / eating out; running / swimming; large universities / small colleges;
saving money / investing it; board games / video games; natural gas / wind power; renewable energy / nuclear power;
Python / JavaScript; SQL databases / NoSQL databases; Windows / Linux; stacks / queues; threads / processes; compiled
languages / interpreted languages; capitalism / socialism; inflation / deflation; stocks / bonds; civil law / criminal
law; viruses / bacteria; mass / weight; speed / velocity; frogs / toads; alligators / crocodiles; comets / asteroids;
stalactites / stalagmites; mean / median; area / perimeter; speaking / writing; justice / mercy; freedom / security;
knowledge / wisdom; fame / respect; long holidays / several short trips; wooden floors / carpets; glasses / contact
lenses; vegetarian diets / Mediterranean diets; herbs / spices; jam / marmalade; broth / stock; LED bulbs /
incandescent bulbs; haiku / sonnets; tragedy / comedy; opera / musicals; jazz / blues; violins / violas; ancient Athens
/ ancient Sparta; solar panels / heat pumps; podcasts / radio; emails / phone calls; uniforms / free choice of clothes;
small weddings / big weddings
""")

# Noun phrases one can be for or against.
ISSUES = items("""
banning cars from city centres; a four-day work week; homework in primary schools; school uniforms; a tax on sugary
drinks; free public transport; compulsory voting; self-driving taxis; zoos; space tourism; remote work; standardised
tests; a universal basic income; cashless shops; genetically modified crops; social media for children; mandatory
military service; keeping exotic pets; longer school days; unpaid internships; open-plan offices; a ban on plastic
bags; private schools; artificial intelligence in hospitals; facial recognition in public places; daylight saving time;
fast fashion; night flights; single-sex schools; mandatory recycling; subsidies for electric cars; tuition-free
universities; animal testing; lotteries; competitive sports for young children; working past seventy; mobile phones in
classrooms; raising the driving age; rent control; congestion charges; bottled water; lab-grown meat; online dating;
open borders; video games as a school subject; surveillance cameras in shops; paying students for good grades; teaching
cursive handwriting; banning advertising to children; all-you-can-eat buffets
""")

DISHES = items("""
lentil soup; mushroom risotto; vegetable curry; chicken noodle soup; shepherd's pie; potato gratin; falafel; beef stew;
spinach lasagne; pad thai; gazpacho; tomato soup; fish tacos; pumpkin pie; sushi rolls; black bean chili; ratatouille;
paella; pancakes; French onion soup; dumplings; hummus; guacamole; minestrone; goulash; ramen; bibimbap; tiramisu;
cheesecake; oatmeal cookies; roast chicken; stuffed peppers; pierogi; moussaka; spring rolls; jollof rice; borscht;
ceviche; tabbouleh; coleslaw; cornbread; biryani; dal; lemon tart; focaccia; carrot cake; kimchi; empanadas; couscous
salad; miso soup; vegetable stir-fry; meatballs; pesto pasta; rice pudding
""")

INGREDIENTS = items("""
chickpeas; spinach; leftover rice; canned tuna; eggs; sweet potatoes; red lentils; cauliflower; tofu; mushrooms; oats;
black beans; courgettes; cabbage; carrots; stale bread; feta cheese; coconut milk; ground beef; chicken thighs; salmon;
broccoli; potatoes; quinoa; bananas; apples; walnuts; yoghurt; leeks; beetroot; pumpkin; frozen peas; couscous;
noodles; tomatoes; corn; kale; aubergines; peanut butter; rice paper; green beans; mozzarella; shrimp; fennel; dates;
barley; avocado; celery
""")

HEALTH = items("""
lower back pain; headaches after screen work; seasonal allergies; trouble falling asleep; dry skin in winter; sore
muscles; mild anxiety; low energy; motion sickness; bad posture; heartburn; stiff shoulders; jet lag; hiccups; tired
eyes; cold hands; dehydration; shin splints; a runny nose; a sore throat; stress at work; cravings for sugar; snoring;
indigestion; vitamin D deficiency; high blood pressure; blisters; a stiff neck; sunburn; insect bites; hay fever
""")

BRAINSTORM = items("""
names for a hamster; names for a(n) {business}; themes for an office party; rainy-day activities for children; low-cost
date ideas; icebreaker questions for a new team; fundraising ideas for a school; titles for a travel memoir; ways to
reuse glass jars; science fair projects; topics for a podcast about {hobby}; quiet hobbies; gifts under twenty dollars
for a(n) {job}; healthy snacks for long drives; warm-up games for a drama class; slogans for a(n) {business}; ways to
say thank you; questions to ask at a flat viewing; blog post ideas about {blog}; uses for an old {object}; team names
for a quiz night; things to do in {city} for free; ways to make a small room look bigger; words that rhyme with light;
book club discussion questions; features for a new {product}; ideas for a mural in a school; picnic foods; first lines
for a(n) {genre} novel; jobs for people who love {hobby}; conversation topics for a first date; kindness challenges for
a week; items for an emergency kit; ways to celebrate a birthday alone; debate topics for teenagers; games for a long
train ride; marketing ideas for a(n) {business}; small habits that reduce stress; breakfast ideas without eggs; costume
ideas for two people; inventions that would help a(n) {job}; indoor plants for dark rooms; compliments that are not
about looks; excuses a(n) {animal} might give for being late; names for a fictional village; uses for leftover
{ingredient}; questions for an interview with a(n) {job}; weekend projects for beginners in {hobby}; metaphors for
{theme}; ways to save time in the morning; superpowers that are almost useless; rules for a shared kitchen; synonyms
for happy; story ideas set in {place}; mini-games for a video game about a(n) {animal}; ways to attract visitors to
{city}; safety tips for {hobby}
""")

# ----------------------------------
# Fillers: coding.
# ----------------------------------

# After "a function that".
CODE_TASKS = items("""
removes duplicate lines from a file while keeping their order; converts seconds to hours, minutes and seconds; merges
two dictionaries by adding their values; rotates a list by k positions; finds the longest word in a text; checks
whether two strings are anagrams; flattens a nested list; groups people by their year of birth; validates a phone
number; computes a moving average; parses a CSV file without libraries; turns snake_case into camelCase; finds missing
numbers in a range; generates a random password; reverses the words in a sentence; converts a Roman numeral to an
integer; computes compound interest; sorts a list of dates; removes HTML tags from a string; finds the most common
letter; splits a list into chunks of equal size; returns the second largest number; transposes a matrix; checks whether
a year is a leap year; turns a number into words; draws a triangle of stars; simulates rolling two dice; calculates the
distance between two points; finds all files larger than a given size; retries a network request three times; caches
its results; reads a JSON file and prints its keys; counts lines of code in a folder; converts Celsius to Fahrenheit;
finds the intersection of two sets; shuffles a deck of cards; validates a credit card number; truncates text at a word
boundary; renders a progress bar; converts a colour from hex to RGB; merges overlapping intervals; implements binary
search; removes empty strings from an array; builds a histogram of word lengths; formats a number with thousands
separators; compares two version strings; converts a binary string to a decimal number; prints a multiplication table;
extracts all email addresses from a text; pads a string to a fixed width; measures how long another function takes;
deep-copies a nested structure; finds the first unique character; rounds prices to the nearest five cents; capitalises
every word in a title; downloads an image and saves it; schedules tasks by priority; turns a list of pairs into a
lookup table; finds the shortest path in a grid
""")

CODE_CONCEPTS = items("""
recursion; closures; list comprehensions; generators; async and await; promises; callbacks; pointers; smart pointers;
templates in C++; inheritance; polymorphism; interfaces; dependency injection; mocking; continuous integration; version
control branches; merge conflicts; rebasing in Git; REST APIs; GraphQL; webhooks; cookies and sessions; CORS;
environment variables; virtual environments; Docker containers; regular expressions; hash maps; heaps; breadth-first
search; dynamic programming; big-O notation; memoisation; race conditions; deadlocks; mutexes; message queues; database
indexes; SQL joins; foreign keys; normalisation; SQL injection; prepared statements; the event loop; the box model;
responsive design; type hints; exceptions; context managers; variable scope; floating-point errors; character
encodings; pipes in the shell; file permissions; environment paths; SSH keys; makefiles; linters; semantic versioning;
feature flags; immutable data; lazy evaluation; iterators; enums; operator overloading; the singleton pattern; the
observer pattern
""")

SQL_TASKS = items("""
lists the five customers who spent the most; counts orders per month; finds products that were never ordered; shows the
average price per category; finds duplicate email addresses; returns the latest order of each customer; lists employees
who earn more than their manager; computes a running total of sales; deletes rows older than one year; joins orders
with customers; shows the share of cancelled orders; ranks shops by revenue; updates prices by ten percent; finds days
without any sales; counts new users per week; lists authors with at least three books; selects a random sample of rows;
finds customers from two countries who ordered twice; pivots monthly sales into columns; returns the median delivery
time
""")

SHELL_TASKS = items("""
find all files changed in the last two days; count the lines in every text file; rename all JPG files with a prefix;
replace a word in many files; list running processes that use much memory; compress a folder without its logs; watch a
log file for errors; delete empty directories; compare two folders; kill a process that listens on a port; create ten
numbered directories; download a file and check its hash; sort a file and remove duplicates; show free disk space; find
broken symbolic links; convert line endings; copy files to a remote server; count how often each IP address occurs in a
log; split a large file into parts; show the last commit of a repository; search for a word in compressed logs; set an
environment variable permanently
""")

CODE_LANGUAGES = items("Python; JavaScript; Python; C++; Java; Go; Rust; TypeScript; Ruby; C#; Kotlin; PHP")

ERRORS = items("""
IndexError: list index out of range; KeyError: 'user_id'; ModuleNotFoundError: No module named 'requests';
IndentationError: unexpected indent; RecursionError: maximum recursion depth exceeded; TypeError: undefined is not a
function; Segmentation fault (core dumped); error: expected unqualified-id before 'return'; undefined reference to
`main'; fatal: not a git repository; Permission denied (publickey); CORS policy: No 'Access-Control-Allow-Origin'
header is present; ERROR: duplicate key value violates unique constraint; UnicodeDecodeError: 'utf-8' codec can't
decode byte 0xe9; error: cannot borrow `list` as mutable; MemoryError; no space left on device; AttributeError:
'NoneType' object has no attribute 'strip'; HTTP 429 Too Many Requests
""")

# Short snippets that work; {var} and {fn} vary the names.
VARS = items(
    "price; score; temperature; item; user; value; count; node; town; weight; order; age; point; grade; step; line"
)
FUNCTIONS = items(
    "process; compute; handle; run; update; check; convert; collect; build; scan; measure; prepare; solve; pick"
)
SNIPPETS = (
    "def {fn}({var}s):\n    result = []\n    for {var} in {var}s:\n        if {var} > {:2-50}:\n"
    "            result.append({var} * {:2-9})\n    return result",
    "const {fn} = ({var}s) => {var}s.filter(({var}) => {var} > {:2-50}).map(({var}) => {var} + {:1-9});",
    "def {fn}({var}s):\n    seen = {}\n    for {var} in {var}s:\n        seen[{var}] = seen.get({var}, 0) + 1\n"
    "    return max(seen, key=seen.get)",
    "SELECT {var}, COUNT(*) FROM {var}s WHERE year > {:2000-2020} GROUP BY {var} HAVING COUNT(*) > {:2-20};",
    "int {fn}(int {var}) {\n    if ({var} <= 1) return {:1-3};\n    return {var} + {fn}({var} - {:1-2});\n}",
    "{var}s = [x ** 2 for x in range({:5-20}) if x % {:2-5} == 0]\nprint(sum({var}s))",
    "let {var} = {:1-20};\nwhile ({var} < {:50-200}) {\n  {var} = {var} * 2;\n}\nconsole.log({var});",
    "grep -c 'error' {var}s.log | sort -n | tail -{:3-20}",
    "def {fn}({var}, step={:2-9}):\n    while {var} > 0:\n        yield {var}\n        {var} -= step",
    "for (int i = 0; i < {:3-9}; i++) {\n    for (int j = 0; j <= i; j++) std::cout << '*';\n    std::cout << "
    "'\\n';\n}",
    "{var}s = {'a': {:1-9}, 'b': {:1-9}}\nfor key, {var} in sorted({var}s.items()):\n    print(key, {var})",
    "class {^var}:\n    total = 0\n\n    def {fn}(self, n={:2-9}):\n        self.total += n\n        return self",
)

# Short snippets with a bug.
BUGS = (
    "def {fn}({var}s):\n    total = 0\n    for {var} in {var}s:\n        total = {var}\n    return total / len({var}s)",
    "def {fn}({var}s=[]):\n    {var}s.append({:1-99})\n    return {var}s",
    "for i in range(1, len({var}s) + 1):\n    print({var}s[i])",
    "if ({var} = {:2-90}) {\n  console.log('match');\n}",
    "{var} = input('Enter a number: ')\nprint({var} + {:2-20})",
    "function {fn}({var}s) {\n  {var}s.forEach(({var}) => {\n    if ({var} > {:2-90}) return {var};\n  });\n}",
    "SELECT name, MAX({var}) FROM {var}s WHERE MAX({var}) > {:5-90};",
    "int {fn}(int n) {\n    int {var}s[{:5-20}];\n    int sum = 0;\n    for (int i = 0; i <= n; i++) sum += "
    "{var}s[i];\n"
    "    return sum;\n}",
    "for {var} in {var}s:\n    if {var} < {:2-90}:\n        {var}s.remove({var})",
    "def {fn}({var}):\n    if {var} == 0:\n        return 1\n    return {var} * {fn}({var} - {:2-3})",
    "while True:\n    {var} = {:2-9}\n    {var} += 1\n    if {var} == {:20-90}:\n        break",
    "def {fn}({var}s)\n    for {var} in {var}s:\n        print({var}, {:2-9})",
    "const {var} = {:2-9};\n{var} += {:2-9};\nconsole.log({var});",
)

# ----------------------------------
# Fillers: sentences to translate, rewrite or correct.
# ----------------------------------

SENTENCES = rows("""
The train to {city} leaves at {:6-11} o'clock from platform {:2-12}.
Could you tell me where the nearest pharmacy is?
My {object} is on the table next to the window.
We would like a table for {:2-9} people near the garden, please.
{name} has worked as a(n) {job} in {city} since {:1990-2020}.
I have never seen a(n) {animal} so close before.
The meeting on {day} has been moved to {day2} afternoon.
If it rains tomorrow, we will visit the museum instead.
She said that {theme} was the subject of her next book.
How much does this {product} cost?
The children were playing in the garden when the storm began.
I am allergic to nuts, so please leave them out.
{name} and {name2} met in {city} {:3-30} years ago.
Would you mind opening the window a little?
He forgot his {object} at the station and had to go back.
Our {business} is closed every {day}.
I would rather stay at home and cook {dish} tonight.
Excuse me, is this seat taken?
They have been learning {language} for {:2-9} months.
The new neighbour introduced himself as a(n) {trait} {job}.
It takes about {:10-55/5} minutes to walk to the old town.
Please send the documents before the end of {month}.
There was a(n) {animal} asleep in front of the door.
In {month}, the weather in {city} is usually pleasant.
I lost my wallet on the bus, and I need help.
{name} wants to {goal}.
Nobody knew why the lights had gone out.
My grandmother taught me how to make {dish}.
Let us meet in front of the library at noon.
You should book the tickets at least {:2-9} days in advance.
""")

# With mistakes.
BAD_SENTENCES = rows("""
{name} dont like to eat {dish} on {day}s.
Me and {name} was going to {city} last {month}.
Their going to they're house with there {animal}.
She have been a(n) {job} since {:2-9} years.
I seen {:2-9} {goods} on the table yesterday but now its gone.
He is more taller then his brother {name}.
The informations about {city} is not very useful to we.
{name} and {name2} has forgot they're {object} at home.
If I would have knew about the {object}, I would of bought it.
Yesterday we go to {city} and seen a {animal}.
Each of the {goods} have it's own price.
I am living in {city} since {:1990-2020} and I am loving it.
Could you borrow me you're {object} until {day}?
There is less {goods} in the box then last week.
The {job} told to me that the shop were closing at {:5-9}.
One of my friend are from {country} and he speak good english.
We discussed about the {product} and we was agreeing.
{name} run very quick but {name2} run more quicker.
Its been along time since i visit {country}
the {animal} lost it's way becuase of the wether
Who's {object} is this, and whom left it hear?
He didnt went to work on {day} becuase he were sick.
""")

BLUNT = rows("""
Send me the report by {day} or do not bother coming in.
Your {product} is useless and I want my money back.
I don't care what {name} thinks about it.
You are late again, {name}. This is unacceptable.
Nobody read your email about the {object}.
The food at your {business} was cold and the waiter was rude.
Stop calling me after {:5-9} in the evening.
Your plan for {month} makes no sense.
I can't come on {day}. Find someone else.
This draft is boring. Write it again.
The {job} did a terrible job and charged me {:50-400/10} dollars.
hey, need that file asap, where is it??
Tell {name} to stop leaving the {object} in the kitchen.
We're not paying {:100-900/50} dollars for this. Fix it.
You forgot to order the {goods}. Again.
Your idea about {issue} is silly.
gonna be late, traffic is nuts, start without me
Why did nobody tell me that {news}?
I hate working with {name}. They never listen.
Move your car. It is blocking my driveway.
""")

UNPUNCTUATED = rows("""
my {job} said the {object} is on the shelf in the kitchen can you check please
we visited {country} in {month} and stayed with {name} who lives near the harbour
why is the {animal} sitting on the roof nobody knows not even {name}
i bought {goods} {goods2} and {goods3} on {day} but i forgot the {object}
after the film {name} and {name2} went home it was raining and they had no umbrella
dear {name} thank you for the {object} it arrived on {day} and i love it
when is the next train to {city} asked the {job} the guard did not answer
""")

TONES = items("""
more polite; more formal; friendlier; funnier; more persuasive; more diplomatic; more enthusiastic; simpler; more
professional; warmer; more casual; more neutral; more poetic; more confident; less aggressive; clearer
""")

IDIOMS = items("""
break the ice; bite the bullet; once in a blue moon; under the weather; a piece of cake; hit the nail on the head; let
the cat out of the bag; the ball is in your court; burn the midnight oil; barking up the wrong tree; a blessing in
disguise; cut corners; kill two birds with one stone; the last straw; pull someone's leg; the tip of the iceberg;
through thick and thin; beat around the bush; a storm in a teacup; sit tight; the elephant in the room; miss the boat;
call it a day; jump on the bandwagon; steal someone's thunder; keep an eye on; add fuel to the fire; back to square
one; every cloud has a silver lining; bend over backwards
""")

WORDS = items("""
ambiguous; benevolent; candid; diligent; frugal; gregarious; hesitant; impartial; jubilant; keen; lucid; nostalgic;
obsolete; pragmatic; quaint; resilient; serene; tenacious; ubiquitous; wary; zealous; abundant; brittle; cautious;
dormant; elusive; genuine; hostile; inevitable; judicious; lenient; mundane; notorious; opaque; reluctant; scarce;
tedious; uncanny; versatile; whimsical; adverse; coherent; deliberate; ephemeral
""")

# ----------------------------------
# Fillers: passages.  In QA_PASSAGES, lines that start with "?" are questions about the paragraph above them.
# ----------------------------------

QA_PASSAGES = """
{name} {surname} opened a small {business} in {city} in {:1985-2015}. At first only {:3-9} people worked there, but
after a newspaper wrote about the place, customers began to queue outside. Today the owner employs {:20-60} people and
plans to open a second location in {city2} next {month}.
? Where is the second location going to be?
? When did {name} open the {business}, and how many people worked there at first?
? Why did customers begin to queue outside?
? By how much has the number of employees grown?

Last {day}, a(n) {animal} escaped from the zoo in {city}. It was first seen by a(n) {job}, who was on the way to work
at about {:5-9} in the morning. The keepers followed its tracks to a garden, where they found it eating {dish}. Nobody
was hurt, and the zoo has promised to repair the fence.
? Who saw the {animal} first?
? What was the {animal} eating when it was found?
? What will the zoo do now?
? On which day did this happen, and in which city?

The {gadget} comes with a {:2-5}-year warranty and a charging cable. It works for up to {:6-30} hours before it needs
to be charged, which takes {:40-90/10} minutes. Customers can return it within {:14-60} days if the box is undamaged.
Repairs are done in {city}, and spare parts are available for {:6-10} years.
? How long does charging take?
? Can a customer return the {gadget} without its box?
? Where are repairs done?
? Which lasts longer, the warranty or the supply of spare parts?

In {month}, our class visited {country}. We stayed in {city} for {:2-4} nights and then took a bus to the mountains.
{name} lost a passport on the second day, so our teacher had to go to the embassy. The rest of us learned how to cook
{dish} and went on a long hike. On the last evening we sang songs around a fire.
? What did {name} lose?
? How did the class travel to the mountains?
? What did the students learn to cook?
? Why did the teacher go to the embassy?

The {surname} Bridge was finished in {:1870-1935} after {:4-12} years of work. It is {:200-900/10} metres long and
connects the old town with the harbour. During a storm in {:1950-1990}, two of its arches were damaged, and engineers
replaced the stone with steel. About {:2-9},000 cyclists cross it every day, while cars have not been allowed since
{:2000-2020}.
? Who may cross the bridge today?
? When were two arches damaged, and what caused it?
? Which two places does the bridge connect?
? What material replaced the stone?

{name}, {name2} and {name3} share a flat. {name} pays {:300-600/10} euros a month, {name2} pays {:200-290/10} euros and
{name3} pays the remaining {:100-190/10} euros because that room is the smallest. They clean on {day}s and cook
together on {day2}s. Last month they bought a(n) {product}, and each of them paid a third of the price.
? Who has the smallest room?
? How much is the total rent?
? On which day do they clean?
? What did they buy together?

Researchers in {city} asked {:200-900/50} adults about {hobby}. About {:55-85} percent said that it made them feel
calmer, while {:5-15} percent felt no difference. People who spent more than {:2-6} hours a week on it also slept
better. The authors warn that the study does not prove a cause, because relaxed people may simply have more free time.
? Does the study prove that {hobby} improves sleep? Explain.
? How many people took part?
? What did the people who spent more hours on it report?
? What percentage felt no difference?

The {animal} in this reserve is most active at night. It feeds mainly on insects and fruit, sleeps in hollow trees and
avoids open fields. Rangers counted {:30-90} animals in {:2010-2015} and {:100-300} in {:2020-2024}. They believe that
the ban on pesticides is the main reason for the increase, although milder winters may also have helped.
? When is the {animal} most active?
? What reasons do the rangers give for the increase?
? Where does the {animal} sleep?
? How did the population change?

Course {:100-499}: Introduction to {hobby}. The course meets every {day} from {:5-7} to {:8-9} p.m. in room {:10-80}.
It costs {:60-240/10} dollars, and materials are included. Students under 18 pay half. Please register before {month}
{:2-28}. The teacher, {name} {surname}, has {:5-25} years of experience and also works as a(n) {job}.
? How much does a sixteen-year-old student pay?
? Do students need to buy materials?
? Who teaches the course, and what else does the teacher do?
? What is the registration deadline?

{name} planned to {goal}. In the first week everything went well, but in the second week an illness ruined the plan.
Instead of giving up, {name} asked {name2} for help. They agreed to talk every {day}, and after {:3-9} months the goal
was reached. "I could not have done it alone," said {name}.
? What went wrong in the second week?
? How did {name2} help?
? How long did it take to reach the goal?
? What lesson does the text suggest?

The town council of {city} met on {day} to discuss {issue}. {:12-20} members voted in favour, {:5-11} voted against and
{:1-4} abstained. Supporters said that the change would save money, while opponents feared that older residents would
suffer. A trial period will begin in {month}, after which the council will decide again.
? What were opponents afraid of?
? How many members voted in total?
? When will the trial period begin?
? Is the decision final? Give the sentence that tells you.

Grandfather kept a(n) {object} in the top drawer of his desk. He said he had won it from a(n) {trait} {job} in {city},
but Grandmother always laughed when he told the story. After he died, {name} found a receipt from a shop in {city2} in
the same drawer. It was dated {month} {:2-28}, {:1950-1975}.
? Where did the {object} probably come from?
? Why did Grandmother laugh, do you think?
? What did {name} find?
? According to Grandfather, who had owned the {object} before?

To: all staff. The lift in building {:2-9} will be out of service from {day} morning until {day2} evening. Please use
the stairs on the east side. Visitors who need help should call {name} {surname} on extension {:200-899}. The canteen
remains open, but it will serve only cold food and {dish}.
? Whom should visitors call if they need help?
? Which stairs should people use?
? What can people eat in the canteen?
? How long will the lift be out of service?

A famous story says that {theme} inspired the painter {name} {surname} to leave {city} at the age of {:19-35}. The
truth is less romantic: letters show that the rent was too high. In {city2} the painter shared a studio with a(n)
{job}, sold {:3-9} pictures in {:2-5} years and finally became known for a portrait of a(n) {animal}.
? Why did the painter really leave {city}?
? What made the painter famous?
? How many pictures were sold, and in how many years?
? With whom did the painter share a studio?
"""

# For summaries and extraction; no questions attached.
PASSAGES = blocks("""
When {name} moved to {city}, the first thing that surprised everyone was how quiet the mornings were. The {business} on
the corner opened at {:6-9}, the buses were half empty, and people greeted each other by name. After {:2-9} months,
{name} knew half of the street and had joined a group for {hobby}. The city that had seemed so cold at first had slowly
become a home.

Many companies now let their employees work from home for {:2-4} days a week. Managers report fewer sick days and lower
costs for offices. However, new employees often find it harder to learn from colleagues, and some feel lonely. A survey
in {country} found that {:55-80} percent of workers would like to keep the choice, as long as teams meet in person at
least once a month.

{^hobby} has become popular in {country} in recent years. Clubs in {city} report waiting lists of up to {:3-12} months,
and shops sell out of equipment every {month}. Experts give three reasons: videos on the internet make it easy to
start, it costs little, and people look for activities without screens. Critics say that the boom will not last.

The {product} was tested by our team for {:3-8} weeks. It is light, well made and easy to clean. On the other hand, the
manual is confusing, and the price of {:60-400/10} dollars is high compared with similar models. We recommend it to
people who will use it every day; occasional users may prefer the cheaper version, which lacks only the timer.

Rivers shape the land in two ways. In the mountains, fast water carries stones and cuts deep valleys. In flat country,
the water slows down and drops sand and mud, which builds fertile plains. Dams interrupt this process: behind the wall
the mud collects, while farmers downstream lose the natural fertiliser. Engineers in {country} now open the gates for
{:2-9} days every {month} to let the mud pass.

Dear residents, as you know, {news}. Because of this, the car park behind the {business} will be closed until {day}.
Deliveries are possible between {:6-9} and {:10-12} in the morning. If you have questions, please contact {name}
{surname} at the town hall. We are sorry for the inconvenience and thank you for your patience.

Bees are not the only insects that carry pollen. Hoverflies, beetles, moths and even ants visit flowers as well. A team
from {city} counted visits to {:20-90} gardens and found that hoverflies made {:20-45} percent of them. Gardens with
many kinds of flowers received the most visitors. The team advises people to leave a corner of the garden wild and to
avoid spraying in {month}.

It was already dark when the {trait} {job} reached {place}. Nobody answered the door, but a light was burning upstairs.
On the table stood a(n) {object}, and beside it lay a note: "Do not wait for me." Outside, a(n) {animal} called once
and fell silent. The visitor sat down, read the note again and decided to stay until morning.

The debate about {issue} in {country} is not new. Supporters argue that it would help families and save public money in
the long run. Opponents reply that the costs are uncertain and that people should decide for themselves. A small
experiment in {city} gave mixed results: {:40-60} percent of those involved were satisfied, while the rest wanted
changes.

Sleep has several stages. During deep sleep the body repairs muscles and the brain clears waste. Later in the night,
dreams become more frequent, and memories are sorted. People who sleep less than {:5-6} hours for many nights react
more slowly and catch colds more easily. Doctors advise a regular bedtime, a dark room and no screens for {:30-90/10}
minutes before bed.

{name} {surname} was born in {city} in {:1900-1940} as the youngest of {:4-9} children. After leaving school at
fourteen, {name} worked as a(n) {job} and studied at night. A lucky meeting with an engineer led to a job in {city2},
where {name} designed a new kind of {object}. The invention never made much money, but it is still used today.

Minutes of the meeting on {day}: {name} reported that sales of the {product} rose by {:3-25} percent. {name2} said that
two suppliers are late and suggested looking for a new one in {country}. {name3} will prepare a list by {month}
{:2-28}. The team agreed to delay the new website until the photos are ready. The next meeting takes place on {day2} at
{:9-11} a.m.
""")

# Opinion paragraphs are put together from three parts about one hobby.
PARA_OPEN = rows("""
Few people expect {hobby} to change their lives.
When I first heard about {hobby}, I thought it was only for people with too much time.
In {city}, {hobby} has a long tradition.
There are many good reasons to try {hobby}.
A friend of mine, {name5}, talks about nothing but {hobby}.
My doctor suggested {hobby} after a stressful year.
Some people say that {hobby} is a waste of time.
For beginners, {hobby} can be confusing.
Every {day}, about {:12-40} people meet in {city} for {hobby}.
""")
PARA_MIDDLE = rows("""
It takes patience, and the first {:3-12} weeks can be frustrating.
You need almost no equipment, only a notebook and some curiosity.
Most people give up too early because they compare themselves with experts.
The costs are modest: about {:20-90/5} dollars a month, including lessons.
What matters is not talent but a fixed time in the week.
Studies suggest that it lowers stress and improves memory.
It also brings together people who would never meet otherwise, such as a(n) {job} and a(n) {job2}.
There are risks too, and a good teacher explains them on the first day.
Children learn it faster, but older people often stay with it longer.
Online videos help at the start, though they cannot replace honest feedback.
""")
PARA_END = rows("""
In the end, the best way to find out is to try it for a month.
I have not missed a single {day} since.
Perhaps that is why it is so popular in {country}.
Whether it is worth the effort is something everyone must decide alone.
If you start small, you will be surprised how far you get by {month}.
That is why I think schools should offer it.
Still, nobody should feel guilty for stopping.
Next year the club wants to organise a festival in {city2}.
""")

REVIEW_OPEN = rows("""
I bought this {product} in {month}.
My {product} arrived {:2-9} days late.
We stayed at this hotel in {city} for {:2-9} nights.
I ordered a(n) {product} from this shop last {day}.
I once owned another {product}, so I can compare.
A friend recommended this {business} to me.
I gave this {product} to my mother as a present.
Our family visited this {business} in {city} on {day}.
""")
REVIEW_GOOD = rows("""
The quality is better than I expected.
The staff were friendly and patient.
It looks even better than in the photos.
The price is fair for what you get.
Everything was clean and well organised.
{name} at the help desk answered within {:2-9} minutes.
I would happily recommend it to anyone.
""")
REVIEW_BAD = rows("""
However, the problems started after {:2-9} days.
Unfortunately, nobody replied to my {:2-9} messages.
The information on the website was wrong.
It is far too expensive at {:40-300/10} dollars.
Sadly, it looked nothing like the pictures.
It was so noisy that I could not sleep.
I asked for a refund and I am still waiting.
""")

# ----------------------------------
# Templates by category.
# ----------------------------------

TEMPLATES = {
    "creative": (
        "Write a(n) {genre} story of about {:200-500/50} words. The hero is {name}, a(n) {trait} {job} who {deed}. "
        "The story takes place in {place}, it must contain a(n) {object} and a(n) {animal}, and it should end with a "
        "line that a reader will remember.",
        "Write a short story about a(n) {trait} {job} who {deed}.",
        "Write a(n) {genre} story set in {place}.",
        "Write a poem about {theme}.",
        "Write a haiku about a(n) {animal} in {month}.",
        "Write a limerick about a(n) {trait} {job} from {city}.",
        "Write the opening paragraph of a(n) {genre} novel in which a(n) {job} {deed}.",
        "Write a dialogue between a(n) {animal} and a(n) {animal2} about {theme}.",
        'Continue this story: "It was already {day} evening when {name} found the {object} in {place}."',
        "Describe {place} so that the reader can see, hear and smell it.",
        "Invent a myth that explains why {why}.",
        "Write a bedtime story for a(n) {:3-9}-year-old about a(n) {trait} {animal} and a(n) {object}.",
        "Write song lyrics about {theme}, with a chorus and two verses.",
        "Write a diary entry by {name}, a(n) {trait} {job}, on the day before leaving {city}.",
        "Make up a fable about {virtue} with a(n) {animal} and a(n) {animal2}.",
        "Tell me a joke about a(n) {job}.",
        "Write a funny letter from a(n) {object} to its owner.",
        "Create a character who is a(n) {trait} {job} and who {deed}. Describe looks, habits and one secret.",
        "{name} and {name2} are stuck in {place}. Write the scene using only dialogue.",
        "A(n) {animal} {deed}. Turn this idea into a children's story.",
        "Give me a surprising ending for a story in which a(n) {job} {deed}.",
        "Write a scene from the point of view of a(n) {animal} living in {place}.",
    ),
    "professional": (
        "I work as a(n) {job} at a(n) {business} in {city}. Please write an email {email}. It goes to {name} "
        "{surname}, whom I met on {day}. Keep it friendly but clear, mention that I am away until {month} {:2-28}, "
        "and close with one specific question.",
        "Write an email {email}.",
        "Draft a polite email {email}. My name is {name} {surname}.",
        "Write a blog post about {blog}.",
        'Write an outline for a blog post titled "What nobody tells you about {blog}".',
        "Write a product description for a(n) {product}.",
        "Write a radio advert for a(n) {business} in {city}.",
        "Write a slogan for a(n) {business} and explain why it works.",
        "Write a speech for {occasion}.",
        "Help me write a toast for {occasion}. Mention {name} and a(n) {object}.",
        "Write a cover letter for a job as a(n) {job} in {city}.",
        "Write a job advertisement for a(n) {job} at a(n) {business}.",
        "Write a short press release: a(n) {business} in {city} is launching a new {product}.",
        "Write a local news report saying that {news}.",
        "Write a social media post that announces {occasion} at our {business}.",
        "Write a letter to the editor arguing against {issue}.",
        "I run a(n) {business}. Write three replies to a customer who left a one-star review.",
        "Write an invitation to {occasion} on {day} at {:4-8} p.m.",
        "Write an FAQ with {:3-6} questions for a(n) {business}.",
        "Write a reference letter for {name}, who worked as a(n) {job} for {:2-9} years.",
        "Write a script for a {:20-60/10}-second video that advertises a(n) {product}.",
    ),
    "roleplay": (
        "We are playing a text adventure. You are the narrator, and I am a(n) {trait} {job} who wakes up in {place} "
        "with nothing but a(n) {object}. Describe what I see, mention a(n) {animal}, offer me {:2-4} choices and "
        "then wait for my answer.",
        "Pretend you are {role}. Tell me {ask}.",
        "You are {role}. Explain {stem} to me in your own style.",
        "Act as {role}. I will ask you some questions. To begin, tell me {ask}.",
        "Imagine you are {role} who has just arrived in {city}. What do you say?",
        "Play the part of {role}. A customer wants a(n) {product}. Start the conversation.",
        "I want you to act as {role}. My problem: {problem}. Advise me.",
        "Answer as {role}: how would you {howto}?",
        "You are {role}, and {name} has just stolen your {object}. React.",
        "Let's do a role-play. You are {role}, and I am a(n) {job}. You begin.",
        "If you were {figure}, what would you think about {issue}?",
        "Imagine an interview with {figure}. Write {:3-5} questions and the answers.",
        "You are a(n) {animal} who can talk. Tell me {ask}.",
        "Be my {language} conversation partner. We are in a(n) {business}. Start with a simple greeting.",
        "You are a(n) {trait} {job}. A child asks you why {why}. Reply in character.",
        "Pretend you are interviewing me for a job as a(n) {job}. Ask me {:3-6} questions.",
        "Act like {role} and complain about {theme}.",
        "Stay in character as {role} and describe what you see when you look at a(n) {object}.",
    ),
    "reasoning": (
        "{name} is older than {name2}, and {name2} is older than {name3}. Who is the youngest?",
        "{name} sits to the left of {name2}. {name3} sits to the right of {name2}. Who sits in the middle?",
        "If today is {day}, what day will it be in {:9-90} days?",
        "Every {animal} in this story is shy. {name}'s pet is a(n) {animal}. Is the pet shy? Explain your reasoning.",
        "Some {job}s like {hobby}. {name} is a(n) {job}. Does it follow that {name} likes {hobby}?",
        "Which is the odd one out, and why: {animal}, {animal2}, {product}, {animal3}?",
        "What comes next in the sequence {seq}? Explain the rule.",
        "{name} puts a(n) {object} in a box and leaves the room. {name2} moves it to a drawer. Where will {name} "
        "look first?",
        "A(n) {object} costs more than a(n) {object2} but less than a(n) {object3}. Which one is the cheapest?",
        "You walk {:2-9} steps north, {:2-9} steps east and {:2-9} steps south. Where are you compared with the start?",
        "What do a(n) {animal} and a(n) {object} have in common? Find {:2-5} things.",
        "There are {:12-40/2} {goods} in a storeroom. {name} takes half, and {name2} takes {:2-5}. How many are left?",
        "Can a(n) {animal} fit inside a(n) {object}? Explain with common sense.",
        "Give me a riddle whose answer is a(n) {object}.",
        "Is it possible to {howto} with only a(n) {object}?",
        "{name} says that {name2} is lying. {name2} says that {name3} is lying. If only {name3} tells the truth, "
        "is this consistent?",
        "Three boxes are {color}, {color2} and {color3}. The {object} is not in the {color} box, and the {color2} box "
        "is empty. Where is the {object}?",
        "In a race, {name} finished before {name2}, {name3} finished after {name2}, and {name4} finished first. "
        "Give the full order.",
        "Every time the bell rings, the {animal} eats. The {animal} is eating now. Did the bell ring? Why or why not?",
        "{name} was seen in {city} at noon and in {city2} at one o'clock. What explanations are possible?",
        "A(n) {job} always takes the stairs down but the lift up. Think of {:2-4} possible reasons.",
        'Find the flaw in this argument: "Every {job} I know loves {hobby}, so {hobby} must make people good {job}s."',
        "A shop sells {goods} only on {day}s and {goods2} only on {day2}s. {name} bought both this week. "
        "What is the smallest number of visits?",
        "My {object} is {color}, and nothing {color} is allowed in the hall. Can I bring it into the hall?",
        'What assumptions does this statement make? "If we allow {issue}, everyone will be happier."',
    ),
    "math": (
        "{name}, {name2} and {name3} open a(n) {business}. They invest ${:1000-4000/500}, ${:1000-4000/500} and "
        "${:5000-9000/500} and agree to share profits in proportion to their investment. In {month} they earn "
        "${:600-3000/60} and spend {:5-25/5}% of it on {goods}. How much does each get?",
        "What is {:12-99} times {:3-29}?",
        "What is {:5-95/5}% of {:40-900/20}?",
        "Solve for x: {:2-9}x + {:2-30} = {:31-99}.",
        "Solve the equation {:2-9}(x - {:1-9}) = {:10-80}. Show each step.",
        "Simplify {:2-9}a + {:2-9}b - {:2-9}a + {:2-9}b.",
        "A rectangle is {:3-30} cm long and {:2-20} cm wide. Find its area and perimeter.",
        "A bag holds {:2-9} {color}, {:2-9} {color2} and {:2-9} {color3} balls. What is the probability of drawing "
        "a {color} one?",
        "You roll two dice. What is the probability that the sum is {:3-11}?",
        "A coin is tossed {:3-6} times. How likely is it to get exactly {:1-3} heads?",
        "{name} buys {:2-9} {goods} at ${:1-9}.{:10-90/10} each and pays with a ${:50-100/50} note. What is the "
        "change?",
        "A train travels {:80-400/20} km in {:2-6} hours. What is its average speed in km/h?",
        "{name} cycles {:4-30} km to {city} at {:12-24} km/h and rests for {:5-40/5} minutes. How long does the trip "
        "take?",
        "The price of a(n) {product} falls from ${:90-200/10} to ${:40-80/5}. By what percentage did it drop?",
        "{name} has {:3-5} times as many {goods} as {name2}. Together they have {:20-90/5}. Set up an equation for "
        "this.",
        "Convert {:3-95} kilometres to miles.",
        "A recipe for {dish} serves {:2-4} people and needs {:100-500/50} g of {ingredient}. How much is needed for "
        "{:6-12} people?",
        "{name} puts ${:200-5000/100} in a bank at {:2-8}% interest per year. How much is there after {:2-6} years?",
        "The sum of two numbers is {:20-90} and their difference is {:2-18}. What are the numbers?",
        "If f(x) = {:2-9}x^2 - {:2-9}x + {:1-9}, what is f({:2-6})?",
        "How many ways can {:4-8} people line up for a photo?",
        "A circle has a radius of {:2-25} cm. What is its circumference?",
        "{name} works {:4-9} hours a day at ${:11-30} an hour. How many days are needed to earn ${:600-3000/100}?",
        "A tank holds {:120-900/20} litres. One pipe fills {:4-20} litres a minute, and a leak loses {:1-3}. "
        "How long until it is full?",
        "Is {:101-399/2} a prime number? Explain how you checked.",
        "What is the greatest common divisor of {:12-96/4} and {:18-120/6}?",
        "A(n) {job} packs {:60-400} {goods} into boxes of {:6-24}. How many full boxes are there, and how many are "
        "left over?",
        "{name} is {:25-50} years old, and {name2} is {:3-12}. In how many years will {name} be twice as old?",
        "A triangle has angles of {:30-70} and {:30-70} degrees. What is the third angle?",
        "In a class of {:30-40} students, {:8-15} play chess, {:8-15} sing, and {:2-6} do both. How many do neither?",
        "Find the slope of the line through ({:1-5}, {:1-9}) and ({:6-12}, {:10-20}).",
        "Write a word problem about {goods} and a(n) {job}, then solve it.",
        "Roughly, what is the base-{:2-5} logarithm of {:10-200}?",
        "A taxi costs ${:2-6} plus ${:1-4} per kilometre. How far can {name} ride for ${:15-60}?",
    ),
    "coding": (
        "I run a small {business} and keep my data in a CSV file with the columns date, customer, product and price. "
        "Write a {code_lang} script that reads the file, skips broken rows, adds up sales per month, and prints the "
        "{:3-10} best customers as a table.",
        "Write a {code_lang} function that {code_task}.",
        "How would you write a program in {code_lang} that {code_task}?",
        "Write {code_lang} code that {code_task}, and include two test cases.",
        "Explain {code_concept} with a small example.",
        "What is the point of {code_concept}?",
        "Explain {code_concept} to {audience}.",
        "What does this code do?\n\n```\n{snippet}\n```",
        "Add comments to this code and suggest better names:\n\n{snippet}",
        "Rewrite this in {code_lang}:\n\n```\n{snippet}\n```",
        "There is a bug in this code. Find and fix it.\n\n```\n{bug}\n```",
        "Write an SQL query that {sql}. The tables are orders(id, customer_id, total, created_at) and customers(id, "
        "name).",
        "Give me a shell command to {shell}.",
        "Write a bash script to {shell} and explain each line.",
        'I get the error "{error}". What does it mean and how do I fix it?',
        "My {code_lang} program is slow when it handles {:2-90},000 {var}s. How can I speed it up?",
        "Write unit tests for a function that {code_task}.",
        "Design a simple class in {code_lang} for a(n) {business}. Which attributes and methods would it have?",
        "Write an HTML page for a(n) {business} with a heading, a list of services and a contact form.",
        "Write a regular expression that matches a date in {month} {:1990-2025}, and explain it.",
        "What is the time complexity of this code?\n\n{snippet}",
    ),
    "extraction": (
        "Extract all names, dates and places from this text as JSON.\n\n{passage}",
        "List every number in the following text and say what it refers to.\n\n{passage}",
        "Is this review positive, negative or mixed? Answer in one word.\n\n{review}",
        "Classify the sentiment of each review.\n\n1. {review}\n2. {review_open2} {review_good2}\n3. {review_bad2}",
        "Turn this order into JSON with the keys name, items and city:\n\n{name} {surname} from {city} ordered "
        "{:2-9} {goods} "
        "and {:2-9} {goods2}.",
        "Convert to CSV:\n\n- {name}, {job}, {city}, {:20-65}\n- {name2}, {job2}, {city2}, {:20-65}\n- {name3}, "
        "{job3}, "
        "{city3}, {:20-65}",
        "Here is a "
        "table:\n\nname,city,{goods}\n{name},{city},{:2-60}\n{name2},{city2},{:2-60}\n{name3},{city3},{:2-60}\n\n"
        "Who has the most {goods}, and what is the total?",
        "Make a Markdown table from this: the {product} costs ${:20-300/5}, the {product2} costs ${:20-300/5} and the "
        "{product3} costs ${:20-300/5}.",
        "Group these words into animals, jobs and food: {animal}, {job}, {dish}, {animal2}, {ingredient}, {job2}.",
        "Extract the action items and who is responsible for them.\n\n{name} will call the {business} by {day}. "
        "{name2} still "
        "has to order {:10-60} {goods}. The {object} was found. {name3} promised to book a hotel in {city}.",
        'Pull the key facts out of this message as bullet points: "Hi {name}, I land in {city} on {day} at '
        "{:6-11}:{:10-50/10}. "
        'Please bring the {object}. Also, {news}. See you, {name2}"',
        "Find the email address and the phone number in this text.\n\nFor questions about {hobby}, write to "
        "{name}.{surname}@example.org or call 555-{:1000-9999} between {:8-10} and {:11-12}.",
        "What topic is this text about? Choose from travel, work, science, family and sport.\n\n{passage}",
        'Turn the JSON into one English sentence: {"name": "{name}", "job": "{job}", "city": "{city}", '
        '"hobby": "{hobby}"}',
        "Extract the ingredients and amounts from this note: For the {dish}, get {:2-9} onions, {:200-900/50} g of "
        "{ingredient}, "
        "{:2-4} litres of water and some {ingredient2}.",
        "Which of these messages are complaints?\n\nA: {blunt}\nB: {review_good}\nC: {review_bad}\nD: {sentence}",
        "From the log below, report the number of errors.\n\n{:8-9}:{:10-59} INFO user {name} logged "
        "in\n{:10-11}:{:10-59} ERROR "
        "{error}\n{:12-13}:{:10-59} INFO {:2-90} files saved\n{:14-15}:{:10-59} ERROR timeout after {:5-60} s",
        'Who does what? Answer as "person: task".\n\nOn {day}, {name} cleans the {object}, {name2} cooks {dish}, '
        "and {name3} "
        "looks after the {animal}.",
        "Identify every adjective in this sentence: The {trait} {job} gave the {trait2} {animal} a {color} {object}.",
    ),
    "stem": (
        "I have to teach a {:30-90/15}-minute lesson about {stem} to a group of {:8-30} students who already know "
        "something about {stem2}. Outline the lesson: an opening question, a short explanation, one activity that "
        "needs only a(n) {object}, and {:2-4} questions to check.",
        "Tell me about {stem}.",
        "Explain {stem} to {audience}.",
        "Give a real-life example of {stem}.",
        "I never really understood {stem}. Can you help?",
        "Why is it important to understand {stem}? Name two applications.",
        "Explain why {why}.",
        "My child asked me why {why}. What should I say?",
        "Is it true that {why}? Explain the science behind it.",
        "How does a(n) {device} work?",
        "Explain step by step how a(n) {device} works.",
        "Describe a simple home experiment about {stem}.",
        "Write {:3-6} quiz questions about {stem} with answers.",
        "Describe the main parts of a(n) {device} and what each part does.",
        "How has our understanding of {stem} changed over time?",
        "Use an analogy with a(n) {object} to explain {stem}.",
        "Is there a link between {stem} and {stem2}?",
        "How is a(n) {animal} adapted to its environment?",
        "what would happen without {stem}",
    ),
    "humanities": (
        "What caused {event}?",
        "What were the consequences of {event}?",
        "Explain {event} to {audience}.",
        "How did {event} affect ordinary people?",
        "Explain the idea of {social} with an example.",
        "Define {social} in your own words.",
        "What are the main criticisms of {social}?",
        "Who was {figure}, and why do people remember this person?",
        "How did {figure} change the world?",
        "Write a short biography of {figure}.",
        "What might a philosopher say about {theme}?",
        "Describe daily life in {country} a hundred years ago.",
        "What is the historical background of {issue}?",
        "Discuss an ethical dilemma that a(n) {job} might face.",
        "Who benefits and who loses from {issue}? Think like an economist.",
        "What legal questions arise when a(n) {business} closes without paying its staff in {country}?",
        "Imagine that {event} had never happened. How might history have been different?",
        "Prepare a timeline of {event} with {:4-7} entries.",
    ),
    "advice": (
        "I am {:19-70} and work as a(n) {job} in {city}. For some time now I have wanted to {goal}, but there is a "
        "difficulty: {problem}. I have about {:20-90/10} minutes a day and a budget of ${:20-300/20} a month. What "
        "would a realistic first month look like?",
        "How do I {howto}?",
        "What is the best way to {howto}?",
        "Can you give me step-by-step instructions to {howto}?",
        "What mistakes should I avoid when I {howto}?",
        "I want to {goal}. Where do I start?",
        "Make a {:2-8}-week plan for me. My goal is to {goal}.",
        "I keep failing to {goal}. What could I do differently?",
        "What small daily habit would help me {goal}?",
        "{^problem}. What should I do?",
        "I need some advice: {problem}.",
        "I am a(n) {trait} {job} and I want to {goal}. Any tips?",
        "How do I get started with {hobby} on a budget of ${:20-300/10}?",
        "What should I say in a speech at {occasion} if I am nervous?",
        "What do I need to know before buying a(n) {product}?",
        "my {product} broke after {:2-11} months, what can i do",
        "I have {:15-90/15} minutes before guests arrive. How can I quickly {howto}?",
        "What gift would suit a(n) {trait} {job} who loves {hobby}?",
        "{name} and {name2} disagree about {issue} and no longer talk. How can they make peace?",
        "How should I prepare for an interview as a(n) {job}?",
    ),
    "rewriting": (
        "Translate into {language}: {sentence}",
        'How do you say "{sentence}" in {language}?',
        "Correct the mistakes: {bad}",
        "Fix the grammar in this sentence and explain each change.\n\n{bad}",
        "Make this {tone}: {blunt}",
        'Rewrite the following message so that it sounds {tone}.\n\n"{blunt}"',
        "Paraphrase this sentence in two different ways: {sentence}",
        "Change this sentence into the past tense: {sentence}",
        "Rewrite this in the style of a newspaper: {sentence}",
        "Rewrite this paragraph for {audience}.\n\n{para}",
        "Shorten this text to one sentence.\n\n{para}",
        'Use the idiom "{idiom}" in three sentences.',
        'Rewrite this sentence using the word "{word}": {sentence}',
        "Improve the style of this text without changing its meaning.\n\n{para}",
        'Write a friendly reply to this message: "{blunt}"',
        "Add punctuation and capital letters: {lower}",
        'Use the word "{word}" in a sentence about a(n) {job}.',
        "Turn this review into a formal letter to the company.\n\n{review}",
    ),
    "summarising": (
        "Write one short summary that covers all three notes.\n\n{passage}\n\n{para}\n\n{review}",
        "Summarise each text in one sentence and say whether they have anything in common.\n\nText 1: "
        "{passage}\n\nText 2: {passage2}",
        "Summarize the following text in one sentence.\n\n{passage}",
        "Summarise this in three bullet points:\n\n{passage}",
        "{passage}\n\nTL;DR?",
        "What is the main idea of this text?\n\n{passage}",
        "Write a headline for this text.\n\n{passage}",
        "Give a summary for {audience}.\n\n{passage}",
        "Summarize this paragraph in at most {:10-40/5} words.\n\n{para}",
        "{para}\n\nWhat is the author's opinion? Answer briefly.",
        "Condense this review into five words.\n\n{review} {review_good2} {review_bad2}",
        "Summarise both opinions and say how they differ.\n\n{name}: {para_open} {para_middle}\n{name2}: "
        "{para_middle2} {para_end}",
        "Give this text a title and a two-sentence summary.\n\n{para}",
        "Write a tweet that sums this up: {para}",
        "Summarise the customer feedback below in one paragraph.\n\n- {review}\n- {review_open2} {review_bad2}\n"
        "- {review_open3} {review_good2}",
        "Which sentence of this paragraph could be left out, and why?\n\n{para}",
    ),
    "reading": (
        "{qa}",
        "Read the text and answer the question.\n\n{qa}",
        "Answer in a full sentence, using only the text.\n\n{qa}",
        "Context: {qa}",
        '{qa} If the text does not say, answer "unknown".',
        "Passage: {qa} Quote the words that support your answer.",
        "Answer as briefly as you can.\n\n{qa}",
        "{passage}\n\nWrite {:2-5} comprehension questions about this text.",
        "Opening hours: {day} and {day2} {:8-10} a.m. to {:1-4} p.m., {day3} {:10-11} a.m. to {:5-8} p.m. On which "
        "day is "
        "the {business} open longest?",
        "Menu: {dish} ${:5-14}, {dish2} ${:5-14}, {dish3} ${:5-14}. {name} orders two different dishes and pays "
        "${:12-28}. "
        "Which ones could it have been?",
        "Timetable: the bus to {city} leaves at {:6-8}:{:10-55/5}, the one to {city2} at {:9-11}:{:10-55/5}. I reach "
        "the stop "
        "at {:7-9}:30. Which bus can I still catch?",
        "{name}'s mother is a(n) {job}, and her only brother is a(n) {job2} in {city}. What does {name}'s uncle do?",
        "Weather: {city} {:5-30} degrees, {city2} {:5-30} degrees, {city3} {:5-30} degrees. Which city is the coldest?",
        "According to this note, what should {name} bring?\n\nHi {name}, the party is on {day}. {name2} brings "
        "{dish}, I will "
        "buy {goods}, and you only need the {object}. Don't tell {name3}!",
        "{para}\n\nWhat does the writer think of {hobby}, and which sentence shows it?",
        "{passage}\n\nWhich facts here could be checked, and how?",
        "Read this and tell me whether the following statement is true, false or not mentioned: "
        '"{sentence}"\n\n{passage}',
    ),
    "brainstorming": (
        "List {:4-12} {brainstorm}.",
        "Give me {:5-15/5} {brainstorm}.",
        "Can you suggest some {brainstorm}?",
        "Brainstorm {brainstorm} and pick your favourite.",
        "What are some unusual uses for a(n) {object}?",
        "Suggest {:3-8} books or films about {theme}.",
        "Think of {:3-8} questions I could ask a(n) {job}.",
        "List {:4-9} things to check before buying a(n) {product}.",
        "Come up with {:3-6} small business ideas that combine {hobby} and {ingredient}.",
        "Give me ideas for {occasion} with a budget of ${:100-900/50}.",
        "List {:5-10} skills that every {job} needs.",
        "What are {:3-7} ways a(n) {business} could attract more customers?",
        "Suggest {:3-6} research questions about {stem}.",
        "Make a checklist for {blog}.",
        "ideas for {occasion}?",
        "What could a group of {:4-20} people do on a rainy {day} in {city}?",
    ),
    "opinions": (
        "My town wants to decide on {issue}. {name}, a(n) {job}, is strongly in favour, while {name2}, a(n) {job2}, "
        "is against it. Write what each of them would say, point out the weakest argument on each side, and then "
        "tell me which side you find more convincing.",
        "What are the pros and cons of {issue}?",
        "What do you think about {issue}?",
        "Give two arguments for and two against {issue}.",
        "Argue in favour of {issue}.",
        "Write a short debate between {name} and {name2} about {issue}.",
        "What is the difference between {pair_and}?",
        "Compare {pair_and}.",
        "{^pair_or}: which matters more to a(n) {job}, and why?",
        "Which is better, {pair_or}?",
        "Make a table that compares {pair_and} by cost, effort and benefit.",
        "Would you rather live in {city} or {city2}? Give reasons.",
        "Is {hobby} overrated, or is it worth the time?",
        "Should a(n) {business} spend money on a(n) {product} or on advertising?",
        "Which is the better pet for a(n) {trait} {job}: a(n) {animal} or a(n) {animal2}? Be playful.",
        "What is your view on {social}?",
        "How might life in {country} change with or without {issue}?",
        "Is it better to be {trait} or {trait2}?",
    ),
    "lifestyle": (
        "We are {:2-6} friends from {city} who want to spend {:3-10} days in {country} in {month}. Our budget is "
        "${:400-2000/100} each. One of us cannot eat {ingredient}, another one loves {hobby}, and nobody wants to "
        "get up early. Suggest a day-by-day plan.",
        "How do I make {dish}?",
        "Give me a simple recipe for {dish}.",
        "What can I cook with {ingredient} and {ingredient2}?",
        "Suggest a vegetarian dinner with {ingredient} that takes under {:20-60/5} minutes.",
        "How long can I keep {dish} in the fridge?",
        "Plan a {:2-9}-day trip to {city} for {:2-6} people.",
        "What should I pack for a week in {country} in {month}?",
        "What are three things not to miss in {city}?",
        "Which local dishes should I try in {country}?",
        "What is the weather like in {country} in {month}?",
        "How can I travel from {city} to {city2} without flying?",
        "What helps against {health}?",
        "I have {health}. Which foods or habits might help?",
        "Plan a {:10-60/5}-minute workout for a(n) {trait} {job} at home.",
        "Is it healthy to eat {ingredient} every day?",
        "What could I use instead of {ingredient} in {dish}?",
        "Make a weekly meal plan around {ingredient}, {ingredient2} and {ingredient3}.",
        "My guest cannot eat {ingredient}. Suggest a three-course menu.",
        "What customs should a visitor to {country} know about?",
    ),
    "factual": (
        "What is {country} known for?",
        "What is the capital of {country}, and how big is it?",
        "Which languages are spoken in {country}?",
        "Tell me three facts about {city}.",
        "Tell me who {figure} was.",
        "When did {event} take place?",
        "What does a(n) {animal} eat?",
        "How long does a(n) {animal} live on average?",
        "Where in the world would you find a(n) {animal}?",
        'What does the word "{word}" mean?',
        'Give me three synonyms and one opposite of "{word}".',
        'Where does the expression "{idiom}" come from, and what does it mean?',
        "Who invented the {device}?",
        "Who discovered or first described {stem}?",
        "What does a(n) {job} do all day?",
        "What training do you need to become a(n) {job}?",
        "What is the origin of {dish}?",
        "Which vitamins are found in {ingredient}?",
        "What is the history of {hobby}?",
        "How far is it from {city} to {city2}?",
    ),
}

# Extra wishes that may follow a one-line prompt.
PROSE_LIMITS = rows("""
Keep it under {:60-200/20} words.
Make it funny.
Write in the present tense.
Use the first person.
Use simple words.
End with a question.
Keep the tone warm.
Include a(n) {object}.
Use no more than {:4-10} sentences.
Give it a title.
Make it sound natural.
Avoid clichés.
""")
ANSWER_LIMITS = rows("""
Explain it to me like I am {:5-14}.
Give one example.
Answer in {:2-5} sentences.
Use bullet points.
Keep it short.
Answer in under {:50-150/10} words.
Use simple language.
Start with the most important point.
No long introduction, please.
Be specific.
I only need the basics.
I would like a detailed answer.
""")
REASONING_LIMITS = rows("""
Show how you got there.
Explain step by step.
Just give the answer.
Explain your reasoning briefly.
Check your answer.
""")
CODING_LIMITS = rows("""
Keep it short.
Explain each step.
Do not use external libraries.
I am a beginner.
Show an example of how to use it.
Mention edge cases.
""")
LIMITS = {
    "creative": PROSE_LIMITS,
    "professional": PROSE_LIMITS,
    "roleplay": PROSE_LIMITS,
    "reasoning": REASONING_LIMITS,
    "math": REASONING_LIMITS,
    "coding": CODING_LIMITS,
    "stem": ANSWER_LIMITS,
    "humanities": ANSWER_LIMITS,
    "advice": ANSWER_LIMITS[2:],
    "brainstorming": ANSWER_LIMITS[3:],
    "opinions": ANSWER_LIMITS[2:],
    "lifestyle": ANSWER_LIMITS[2:],
    "factual": ANSWER_LIMITS[2:6],
}

# First words of templates that can follow "Please" or "Could you".
IMPERATIVES = frozenset(
    items("""
    Act; Add; Answer; Argue; Brainstorm; Classify; Compare; Complete; Condense; Convert; Convince; Correct; Create;
    Define; Describe; Design; Discuss; Draft; Estimate; Expand; Explain; Extract; Find; Fix; Give; Help; Identify;
    Imagine; Invent; List; Make; Name; Paraphrase; Plan; Play; Prepare; Pretend; Recommend; Rewrite; Shorten; Simplify;
    Solve; Sort; Speak; Stay; Suggest; Summarise; Summarize; Tell; Translate; Turn; Write
    """)
)
ASKS = ("Could you ", "Can you ", "Would you ", "Could you please ")
DEMANDS = ("Please ", "Please ", "I'd like you to ", "I need you to ")
GREETINGS = ("Hi! ", "Hello. ", "Hey! ", "Quick question. ", "I have a question. ", "Hi there. ")
THANKS = (" Thanks!", " Thank you.", " Thanks in advance.")

# ----------------------------------
# Slots
# ----------------------------------


def question_blocks(text: str) -> tuple[str, ...]:
    """Every passage of `QA_PASSAGES` with each of its questions, as "passage, blank line, question"."""
    pairs = []
    for block in text.strip().split("\n\n"):
        passage, *questions = block.split("\n? ")
        pairs += [f"{' '.join(passage.split())}\n\n{question}" for question in questions]
    return tuple(pairs)


def sequences() -> tuple[str, ...]:
    """Number sequences with a constant step, a constant factor or a growing step."""
    steps = [f"{a}, {a + d}, {a + 2 * d}, {a + 3 * d}" for a in range(2, 12) for d in range(3, 10)]
    factors = [f"{a}, {a * q}, {a * q**2}, {a * q**3}" for a in range(1, 8) for q in range(2, 5)]
    growing = [f"{a}, {a + d}, {a + 2 * d + 1}, {a + 3 * d + 3}" for a in range(1, 8) for d in range(1, 5)]
    return tuple(steps + factors + growing)


SLOTS = {
    "animal": ANIMALS,
    "ask": ROLE_ASKS,
    "audience": AUDIENCES,
    "bad": BAD_SENTENCES,
    "blog": BLOG_TOPICS,
    "blunt": BLUNT,
    "brainstorm": BRAINSTORM,
    "bug": BUGS,
    "business": BUSINESSES,
    "city": CITIES,
    "code_concept": CODE_CONCEPTS,
    "code_lang": CODE_LANGUAGES,
    "code_task": CODE_TASKS,
    "color": COLORS,
    "country": COUNTRIES,
    "day": DAYS,
    "deed": DEEDS,
    "device": DEVICES,
    "dish": DISHES,
    "email": EMAIL_AIMS,
    "error": ERRORS,
    "event": EVENTS,
    "figure": FIGURES,
    "fn": FUNCTIONS,
    "gadget": GADGETS,
    "genre": GENRES,
    "goal": GOALS,
    "goods": GOODS,
    "health": HEALTH,
    "hobby": HOBBIES,
    "howto": HOWTO,
    "idiom": IDIOMS,
    "ingredient": INGREDIENTS,
    "issue": ISSUES,
    "job": JOBS,
    "language": LANGUAGES,
    "lower": UNPUNCTUATED,
    "month": MONTHS,
    "name": NAMES,
    "news": NEWS,
    "object": OBJECTS,
    "occasion": OCCASIONS,
    "pair_and": tuple(pair.replace(" / ", " and ") for pair in PAIRS),
    "pair_or": tuple(pair.replace(" / ", " or ") for pair in PAIRS),
    "para": ("{para_open} {para_middle} {para_end}", "{para_open} {para_middle} {para_middle2} {para_end}"),
    "para_end": PARA_END,
    "para_middle": PARA_MIDDLE,
    "para_open": PARA_OPEN,
    "passage": PASSAGES,
    "place": PLACES,
    "problem": PROBLEMS,
    "product": PRODUCTS,
    "qa": question_blocks(QA_PASSAGES),
    "review": ("{review_open} {review_good} {review_bad}", "{review_open} {review_bad}", "{review_open} {review_good}"),
    "review_bad": REVIEW_BAD,
    "review_good": REVIEW_GOOD,
    "review_open": REVIEW_OPEN,
    "role": ROLES,
    "sentence": SENTENCES,
    "seq": sequences(),
    "shell": SHELL_TASKS,
    "snippet": SNIPPETS,
    "social": SOCIAL,
    "sql": SQL_TASKS,
    "stem": STEM,
    "surname": SURNAMES,
    "theme": THEMES,
    "tone": TONES,
    "trait": TRAITS,
    "var": VARS,
    "virtue": VIRTUES,
    "why": WHY_FACTS,
    "word": WORDS,
}

SLOT = re.compile(
    r"\{(?P<upper>\^?)(?P<name>[a-z_]*)(?P<copy>\d?)(?::(?P<low>\d+)-(?P<high>\d+)(?:/(?P<step>\d+))?)?\}"
)
ARTICLE = re.compile(r"\b(?P<article>[Aa])\(n\) (?P<word>[\w-]+)")
VOWEL_SOUND = re.compile(
    r"(?!uni|use|uku|euro|one\b|UFO)[aeiou]|hour|honest|heir|8|11\b|18\b|LED|SQL|X-", re.IGNORECASE
)


def fill(template: str, rng: random.Random, bound: dict[str, str] | None = None) -> str:
    """Replace the slots of `template`, and those inside its fillers, with random values; see the module docstring."""
    values = {} if bound is None else bound
    return SLOT.sub(lambda slot: slot_value(slot, rng, values), template)


def slot_value(slot: re.Match[str], rng: random.Random, bound: dict[str, str]) -> str:
    """The value of one slot, remembered in `bound` under its key."""
    key = slot["name"] + slot["copy"]
    if not key and not slot["low"]:
        return slot[0]  # "{}" in a code snippet
    if not key:
        return draw_number(slot, rng)
    if key not in bound:
        value = draw_number(slot, rng) if slot["low"] else draw_filler(slot["name"], rng, bound)
        bound[key] = value
    return capitalise(bound[key]) if slot["upper"] else bound[key]


def draw_number(slot: re.Match[str], rng: random.Random) -> str:
    """A random whole number in the slot's range."""
    return str(rng.randrange(int(slot["low"]), int(slot["high"]) + 1, int(slot["step"] or 1)))


def draw_filler(name: str, rng: random.Random, bound: dict[str, str]) -> str:
    """A filler from SLOTS[name] that this prompt does not use yet."""
    used = set(bound.values())
    while True:
        value = fill(rng.choice(SLOTS[name]), rng, bound)
        if value not in used:
            return value


def capitalise(text: str) -> str:
    """`text` with its first letter in upper case and the rest unchanged."""
    return text[:1].upper() + text[1:]


def choose_articles(text: str) -> str:
    """Turn every "a(n) word" into "a word" or "an word"."""

    def article(match: re.Match[str]) -> str:
        return f"{match['article']}{'n' if VOWEL_SOUND.match(match['word']) else ''} {match['word']}"

    return ARTICLE.sub(article, text)


# ----------------------------------
# Composition
# ----------------------------------


def add_wish(text: str, category: str, rng: random.Random) -> str:
    """Sometimes append a wish about length or form to a one-line prompt."""
    if category not in LIMITS or "\n" in text or text[-1] not in ".?!" or rng.random() > 0.3:
        return text
    return f"{text} {choose_articles(fill(rng.choice(LIMITS[category]), rng))}"


def make_polite(text: str, rng: random.Random) -> str:
    """Turn an imperative into a request, or put a greeting or thanks around anything else."""
    if text.split(maxsplit=1)[0] not in IMPERATIVES:
        return rng.choice(GREETINGS) + text if rng.random() < 0.6 else text + rng.choice(THANKS)
    request = text[:1].lower() + text[1:]
    if text.endswith(".") and not re.search(r"[.:?!\n] ", text) and rng.random() < 0.5:
        return rng.choice(ASKS) + request[:-1] + "?"
    return rng.choice(DEMANDS) + request


def vary_style(text: str, category: str, rng: random.Random) -> str:
    """Leave most prompts as they are; make some polite and some casual (lower case, no final stop)."""
    roll = rng.random()
    if "\n" in text or roll > 0.3:
        return text
    if roll > 0.1:
        return make_polite(text, rng)
    if category in ("math", "extraction", "rewriting", "coding"):
        return text
    return text.lower().rstrip(".?")


def fingerprint(text: str) -> str:
    """What must differ between two prompts: the words, but not case or punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def draw_new(template: str, seen: set[str], rng: random.Random, tries: int = 20) -> str | None:
    """A filled template that was not seen before, or None if `tries` draws were all seen."""
    for _ in range(tries):
        text = capitalise(choose_articles(fill(template, rng)))
        mark = fingerprint(text)
        if mark not in seen:
            seen.add(mark)
            return text
    return None


def compose_category(category: str, count: int, rng: random.Random) -> list[Prompt]:
    """`count` distinct prompts of one category, taken from its templates in turn."""
    templates = list(TEMPLATES[category])
    prompts: list[Prompt] = []
    seen: set[str] = set()
    while templates and len(prompts) < count:
        for template in tuple(templates)[: count - len(prompts)]:
            text = draw_new(template, seen, rng)
            if text is None:
                templates.remove(template)
                continue
            prompts.append(Prompt(category, vary_style(add_wish(text, category, rng), category, rng)))
    if len(prompts) < count:
        raise ValueError(f"category {category!r} has only {len(prompts)} distinct prompts, {count} were asked for")
    return prompts


def compose(n: int = 16_000, seed: int = 0) -> list[Prompt]:
    """`n` distinct prompts in random order, the same number from every category (give or take one)."""
    rng = random.Random(seed)
    share, extra = divmod(n, len(TEMPLATES))
    prompts: list[Prompt] = []
    for index, category in enumerate(TEMPLATES):
        prompts += compose_category(category, share + (index < extra), rng)
    rng.shuffle(prompts)
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description="Write distinct chat prompts as JSON lines.")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--n", type=int, default=16_000, help="number of prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with args.out.open("w", encoding="utf-8") as file:
        for prompt in compose(args.n, args.seed):
            file.write(json.dumps({"prompt": prompt.text, "category": prompt.category}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
