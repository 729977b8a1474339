"""The demo market's vocabulary: tables only.

It is built so that words mislead the way they do in real catalogs: a type has synonyms, a color has shades, a material has
kinds, brands carry color words ("Silver Peak"), accessories are named after what they are for ("case for smartphones").
Every phrase means one thing (`market_truth` refuses a table where one does not), so the truth can be read from text alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProductType:
    """A kind of product.

    Attributes:
        name: its canonical name, the leaf of the category path.
        synonyms: other phrases for it, in queries and titles.
        price: typical price in dollars; products spread from half to twice of it.
        materials: names of `MATERIALS` it comes in; none: it has no material.
        sizes: name of the size system in `SIZES`, or "".
        audience: whether it is made for an audience (women, men, kids ...).
        accessory_of: the type it belongs to, or "".
    """

    name: str
    synonyms: tuple[str, ...]
    price: float
    materials: tuple[str, ...] = ()
    sizes: str = ""
    audience: bool = False
    accessory_of: str = ""


@dataclass(frozen=True)
class Family:
    """Types of one shelf; `terms` are the broad phrases for all of them; `interchangeable` ones can stand in for one
    another."""

    department: str
    name: str
    terms: tuple[str, ...]
    types: tuple[ProductType, ...]
    interchangeable: bool = True


T = ProductType
_WOODS = ("oak", "walnut", "pine", "bamboo")
_METALS = ("stainless steel", "aluminum", "cast iron")
_FABRICS = ("cotton", "linen", "polyester", "wool", "fleece")
_LEATHERS = ("suede", "full grain leather", "faux leather")
_PLASTICS = ("silicone", "acrylic", "nylon")

FAMILIES: tuple[Family, ...] = (
    Family("Electronics", "Audio", ("audio gear", "sound equipment"), (
        T("Wireless Headphones", ("bluetooth headset", "over ear headphones"), 90),
        T("Earbuds", ("earphones", "in ear buds"), 50),
        T("Portable Speaker", ("bluetooth speaker", "boombox"), 60, _PLASTICS),
        T("Soundbar", ("tv speaker bar",), 150),
    )),
    Family("Electronics", "Computers", ("computer hardware",), (
        T("Laptop", ("notebook computer", "ultrabook"), 800, ("aluminum", "acrylic"), "screen"),
        T("Tablet", ("touchscreen slate",), 350, ("aluminum",), "screen"),
        T("Monitor", ("computer screen", "flat panel display"), 250, (), "screen"),
    )),
    Family("Electronics", "Cameras", ("photography gear",), (
        T("Digital Camera", ("mirrorless cam", "point and shoot"), 500),
        T("Action Camera", ("helmet cam", "sports camcorder"), 200),
    )),
    Family("Electronics", "Phones", ("handsets",), (
        T("Smartphone", ("mobile phone", "cell phone"), 450, ("aluminum",), "storage"),
        T("Flip Phone", ("clamshell phone",), 80),
    )),
    Family("Electronics", "Device Accessories", ("gadget accessories",), (
        T("Phone Case", ("case for smartphone", "mobile phone cover"), 18, _PLASTICS + _LEATHERS, "", False, "Smartphone"),
        T("Laptop Sleeve", ("sleeve for laptop", "notebook computer pouch"), 25, (*_LEATHERS, "nylon"), "screen",
          False, "Laptop"),
        T("Headphone Stand", ("stand for wireless headphones", "headset holder"), 22, _METALS + _WOODS, "", False,
          "Wireless Headphones"),
        T("Camera Bag", ("bag for digital camera", "camera pouch"), 45, (*_LEATHERS, "nylon"), "", False, "Digital Camera"),
        T("Monitor Arm", ("monitor mount", "arm for computer screen"), 60, ("aluminum",), "", False, "Monitor"),
    )),
    Family("Furniture", "Seating", ("seating",), (
        T("Sofa", ("couch", "settee"), 700, _LEATHERS + _FABRICS[:3]),
        T("Armchair", ("accent chair", "lounge chair"), 300, _LEATHERS + _FABRICS[:3]),
        T("Office Chair", ("desk chair", "swivel chair"), 180, (*_LEATHERS, "nylon")),
        T("Bar Stool", ("counter stool",), 90, _WOODS + _METALS),
    )),
    Family("Furniture", "Tables", ("tables",), (
        T("Desk", ("writing table", "workstation"), 220, (*_WOODS, "aluminum")),
        T("Dining Table", ("kitchen table",), 450, _WOODS),
        T("Coffee Table", ("cocktail table",), 160, (*_WOODS, "acrylic")),
        T("Nightstand", ("bedside table",), 90, _WOODS),
    )),
    Family("Furniture", "Bedroom", ("bedroom furnishings",), (
        T("Bed Frame", ("platform bed", "bedstead"), 350, _WOODS + _METALS[:2], "bed"),
        T("Mattress", ("memory foam bed",), 500, (), "bed"),
        T("Duvet", ("comforter", "quilt"), 80, _FABRICS[:4], "bed"),
    ), False),
    Family("Furniture", "Storage", ("shelving and storage",), (
        T("Bookcase", ("bookshelf", "book rack"), 140, _WOODS),
        T("Dresser", ("chest of drawers",), 260, _WOODS),
    )),
    Family("Furniture", "Lighting", ("lighting", "lamps"), (
        T("Table Lamp", ("bedside lamp", "desk lamp"), 45, _METALS[:2] + _WOODS[:2]),
        T("Floor Lamp", ("standing lamp", "torchiere"), 95, _METALS[:2] + _WOODS[:2]),
        T("Ceiling Light", ("flush mount light", "chandelier"), 120, _METALS[:2]),
    )),
    Family("Furniture", "Furniture Accessories", ("furniture protection",), (
        T("Sofa Cover", ("couch slipcover", "cover for sofa"), 50, _FABRICS, "", False, "Sofa"),
        T("Mattress Protector", ("mattress cover", "pad for mattress"), 35, _FABRICS[:3], "bed", False, "Mattress"),
        T("Desk Mat", ("desk pad", "mat for writing table"), 25, (*_LEATHERS, "silicone"), "", False, "Desk"),
        T("Lamp Shade", ("shade for table lamp",), 28, _FABRICS[:2], "", False, "Table Lamp"),
    )),
    Family("Kitchen", "Cookware", ("cookware", "pots and pans"), (
        T("Frying Pan", ("skillet", "saute pan"), 40, _METALS),
        T("Saucepan", ("milk pan",), 35, _METALS, "volume"),
        T("Stockpot", ("soup pot", "dutch oven"), 60, _METALS, "volume"),
    )),
    Family("Kitchen", "Appliances", ("small appliances",), (
        T("Coffee Maker", ("coffee machine", "drip brewer"), 90, (*_METALS[:1], "acrylic")),
        T("Espresso Machine", ("cappuccino maker",), 300, _METALS[:2]),
        T("Kettle", ("water boiler",), 40, (*_METALS[:1], "acrylic"), "volume"),
        T("Blender", ("smoothie maker", "liquidizer"), 70, (*_METALS[:1], "acrylic"), "volume"),
        T("Toaster", ("bread browner",), 35, _METALS[:1]),
    ), False),
    Family("Kitchen", "Drinkware", ("drinkware",), (
        T("Water Bottle", ("hydration flask", "canteen"), 22, _METALS[:2] + _PLASTICS[:2], "volume"),
        T("Travel Mug", ("insulated tumbler", "thermos cup"), 25, (*_METALS[:1], "bamboo"), "volume"),
    )),
    Family("Kitchen", "Kitchen Accessories", ("kitchen supplies",), (
        T("Coffee Filter", ("filter for coffee maker", "brewer paper"), 9, ("cotton",), "pack", False, "Coffee Maker"),
        T("Pan Lid", ("lid for frying pan", "skillet lid"), 15, (*_METALS[:2], "silicone"), "", False, "Frying Pan"),
        T("Bottle Brush", ("brush for water bottle",), 8, ("silicone", "nylon"), "pack", False, "Water Bottle"),
    )),
    Family("Fashion", "Tops", ("tops",), (
        T("T-Shirt", ("tee", "crew neck shirt"), 20, ("cotton", "linen", "polyester"), "clothing", True),
        T("Hoodie", ("hooded sweatshirt",), 45, ("cotton", "fleece", "polyester"), "clothing", True),
        T("Sweater", ("pullover", "jumper"), 55, ("wool", "cotton", "cashmere"), "clothing", True),
    )),
    Family("Fashion", "Outerwear", ("outerwear", "coats"), (
        T("Rain Jacket", ("raincoat", "waterproof shell"), 80, ("nylon", "polyester"), "clothing", True),
        T("Winter Parka", ("puffer coat", "down jacket"), 150, ("nylon", "polyester", "fleece"), "clothing", True),
        T("Biker Jacket", ("moto jacket",), 180, _LEATHERS, "clothing", True),
    )),
    Family("Fashion", "Bottoms", ("bottoms",), (
        T("Jeans", ("denim pants", "dungarees"), 55, ("cotton",), "clothing", True),
        T("Leggings", ("yoga tights",), 30, ("polyester", "nylon", "cotton"), "clothing", True),
        T("Shorts", ("bermudas",), 28, ("cotton", "linen", "polyester"), "clothing", True),
    )),
    Family("Fashion", "Footwear", ("footwear", "shoes"), (
        T("Running Shoes", ("sneakers", "jogging trainers"), 85, ("nylon", "polyester"), "shoe", True),
        T("Hiking Boots", ("trekking boots", "trail boots"), 120, _LEATHERS, "shoe", True),
        T("Sandals", ("flip flops", "slides"), 35, (*_LEATHERS, "silicone"), "shoe", True),
    )),
    Family("Fashion", "Bags", ("bags",), (
        T("Backpack", ("rucksack", "knapsack"), 60, (*_LEATHERS, "nylon", "cotton"), "", True),
        T("Handbag", ("purse", "tote"), 80, (*_LEATHERS, "cotton")),
        T("Wallet", ("billfold", "card holder"), 35, _LEATHERS, "", True),
    )),
    Family("Fashion", "Wear Accessories", ("wardrobe accessories",), (
        T("Wristwatch", ("watch", "chronograph"), 130, ("stainless steel",), "", True),
        T("Watch Band", ("watch strap", "band for wristwatch"), 20, (*_LEATHERS, "silicone"), "", False, "Wristwatch"),
        T("Shoe Insoles", ("inserts for running shoes", "sneakers insole"), 16, ("silicone", "wool"), "shoe", True,
          "Running Shoes"),
        T("Backpack Rain Cover", ("cover for backpack", "rucksack cover"), 14, ("nylon",), "", False, "Backpack"),
    )),
    Family("Outdoor", "Camping", ("camping gear",), (
        T("Tent", ("dome shelter", "camping canopy"), 180, ("nylon", "polyester", "cotton"), "persons"),
        T("Sleeping Bag", ("mummy bag",), 75, ("nylon", "polyester", "fleece"), "", True),
        T("Camp Chair", ("folding chair",), 40, ("nylon", "aluminum")),
        T("Tent Footprint", ("groundsheet for tent", "tent tarp"), 30, ("nylon", "polyester"), "persons", False, "Tent"),
    ), False),
    Family("Outdoor", "Fitness", ("workout equipment",), (
        T("Yoga Mat", ("exercise mat", "pilates mat"), 30, ("silicone", "cotton")),
        T("Dumbbells", ("hand weights", "free weights"), 60, ("cast iron", "stainless steel"), "pack"),
        T("Resistance Bands", ("stretch bands",), 18, ("silicone", "cotton"), "pack"),
    ), False),
    Family("Outdoor", "Cycling", ("bikes", "cycles"), (
        T("Mountain Bike", ("trail bicycle", "mtb"), 600, ("aluminum",), "", True),
        T("Road Bike", ("racing bicycle",), 800, ("aluminum",), "", True),
        T("Bike Pump", ("pump for mountain bike", "tire inflator"), 25, ("aluminum",), "", False, "Mountain Bike"),
        T("Bike Lock", ("lock for road bike", "bicycle chain"), 30, ("stainless steel",), "", False, "Road Bike"),
    )),
    Family("Pets", "Pet Supplies", ("pet supplies",), (
        T("Dog Bed", ("pet cushion", "puppy mattress"), 45, ("fleece", "cotton", "polyester"), "clothing"),
        T("Cat Tree", ("cat tower", "scratching post"), 70, ("pine", "bamboo")),
        T("Dog Leash", ("dog lead", "puppy rope"), 18, ("nylon", "full grain leather", "cotton")),
        T("Pet Bowl", ("dog dish", "cat feeder"), 15, ("stainless steel", "silicone", "bamboo"), "volume"),
    ), False),
    Family("Toys", "Games", ("toys", "playthings"), (
        T("Building Blocks", ("construction bricks",), 35, ("pine", "acrylic"), "pack"),
        T("Jigsaw Puzzle", ("puzzle", "jigsaw"), 18, ("pine",), "pieces"),
        T("Plush Toy", ("stuffed animal", "teddy"), 20, ("cotton", "polyester")),
        T("Board Game", ("tabletop game", "strategy game"), 32),
    ), False),
    Family("Garden", "Garden", ("gardening supplies",), (
        T("Planter", ("flower pot", "plant pot"), 30, ("bamboo", "acrylic", "pine"), "volume"),
        T("Garden Hose", ("watering pipe",), 40, ("nylon",), "length"),
        T("Patio Umbrella", ("parasol", "sunshade"), 90, ("polyester", "cotton"), "length"),
    ), False),
    Family("Tools", "Power Tools", ("diy tools",), (
        T("Cordless Drill", ("power drill", "drill driver"), 110),
        T("Angle Grinder", ("disc cutter",), 85),
        T("Drill Bits", ("bits for cordless drill", "drill bit set"), 22, ("stainless steel",), "pack", False,
          "Cordless Drill"),
        T("Tool Box", ("tool chest",), 50, ("stainless steel", "acrylic")),
    ), False),
)  # fmt: skip

SHADES: dict[str, tuple[str, ...]] = {
    "Black": ("Black", "Onyx", "Jet Black"),
    "White": ("White", "Ivory", "Pearl White"),
    "Gray": ("Gray", "Charcoal", "Slate Gray"),
    "Blue": ("Blue", "Navy", "Cobalt", "Teal"),
    "Red": ("Red", "Crimson", "Burgundy"),
    "Green": ("Green", "Olive", "Emerald"),
    "Brown": ("Brown", "Chestnut", "Mocha"),
    "Pink": ("Pink", "Fuchsia", "Blush"),
    "Yellow": ("Yellow", "Mustard", "Lemon"),
    "Purple": ("Purple", "Lavender", "Plum"),
}
"""Color families and their shades, the plain one first."""

MATERIALS: dict[str, tuple[str, tuple[str, ...]]] = {
    "wood": ("wooden", _WOODS),
    "metal": ("metallic", _METALS),
    "leather": ("leathery", _LEATHERS),
    "wool": ("woolen", ("wool", "cashmere")),
}
"""Families of materials: another phrase for each, and its kinds. A kind outside of these stands alone."""

MATERIAL_KINDS: tuple[str, ...] = tuple(
    dict.fromkeys([*_WOODS, *_METALS, *_FABRICS, "cashmere", *_LEATHERS, *_PLASTICS])
)

SIZES: dict[str, tuple[tuple[str, ...], ...]] = {
    "clothing": (
        ("Size XS", "extra small"),
        ("Size S", "small"),
        ("Size M", "medium"),
        ("Size L", "large"),
        ("Size XL", "extra large"),
    ),
    "shoe": tuple((f"Size {number}",) for number in range(5, 13)),
    "bed": (("Twin", "single bed size"), ("Full", "double bed size"), ("Queen",), ("King",)),
    "screen": tuple((f"{inches} inch", f"{inches} inches") for inches in (11, 13, 15, 17, 24, 27, 32)),
    "storage": tuple((f"{size}GB", f"{size} gigabyte") for size in (64, 128, 256, 512)),
    "volume": tuple((f"{liters} Liter", f"{liters} L") for liters in ("0.5", "0.75", "1.5", "2", "4", "6")),
    "pack": tuple((f"{count} Pack", f"pack of {count}") for count in (2, 4, 6, 12, 24, 100)),
    "persons": tuple((f"{count} Person", f"for {count} people") for count in (1, 2, 3, 4, 6)),
    "pieces": tuple((f"{count} Piece", f"{count} pcs") for count in (100, 300, 500, 1000)),
    "length": tuple((f"{feet} ft", f"{feet} foot") for feet in (7, 9, 10, 25, 50)),
}
"""Size systems: for each size its canonical form and other phrases."""

AUDIENCES: dict[str, tuple[str, ...]] = {
    "Women": ("womens", "ladies", "for her"),
    "Men": ("mens", "gents", "for him"),
    "Kids": ("childrens", "youth", "for children"),
    "Baby": ("infant", "for newborns"),
    "Unisex": ("all gender",),
}

BRANDS: dict[str, tuple[str, ...]] = {
    "Electronics": ("Voltix", "Silver Peak", "Sonara", "Nexvia", "Blackridge", "Pixelon", "Arctek", "Blue Orbit"),
    "Furniture": ("Homestead", "Redwood Living", "Nordika", "Green Valley", "Casaluna", "Urbanest", "Whitestone"),
    "Kitchen": ("Chefmate", "Ironleaf", "Copperfield", "Brewster", "Gourmia", "Goldleaf", "Cookwell"),
    "Fashion": ("Stridewell", "Red Fox", "Aurelia", "Denimore", "Greyhound", "Bellamy", "Summit Wool", "Tidal"),
    "Outdoor": ("Trailhawk", "Summit Wool", "Pine Ridge", "Alpenglow", "Silver Peak", "Fitforge", "Velora"),
    "Pets": ("Pawsome", "Purrfect", "Oak Hound", "Whiskers"),
    "Toys": ("Playnest", "Brickly", "Rainbow Cub", "Puzzlewise"),
    "Garden": ("Greenthumb", "Green Valley", "Sunbrook", "Rosewater"),
    "Tools": ("Ironclad", "Torquemax", "Steelhand", "Handyman Pro"),
}

STYLES = (
    "Classic",
    "Premium",
    "Everyday",
    "Modern",
    "Essential",
    "Deluxe",
    "Signature",
    "Vintage",
    "Ultra",
    "Heritage",
)
"""Words of titles that mean nothing."""
