"""Make the bilingual (English and Chinese) corpus of MiniLLM: text, conversations, preferences and prompts.

The text is simple, true and grammatical, like a child's book.  It is drawn from a seeded grammar, so it is too varied
to be memorised while its vocabulary stays small.  There are four kinds of document, half English and half Chinese:

    story        a small plot: someone has a problem, tries something, and solves it
    description  an animal, a season, a job, a room, a person ... put together from rows of properties
    dialogue     two speakers, one turn a line
    facts        short passages of checkable facts (sums, calendar, comparisons, opposites, who gave what to whom ...)

Output: JSON lines in train/ and val/ below --out.

    pretrain     {"text": ...}
    sft          {"messages": [{"role": ..., "content": ...}, ...]}, in validation with "answer", the bare answer to
                 the last question; in training, single turns are {"prompt": ..., "completion": ...}
                 Of mixed quality, as demonstrations are: in training EVASIVE_SHARE of the last answers evade
    preference   {"prompt": question or messages, "chosen": ..., "rejected": ...}, in validation with "category": wrong,
                 rude, rambling or evasive
    prompts      {"prompt": question or messages, "answer": ...}, in training some of the prompts of preference

Splits.  Every fact has a key that depends on neither language nor wording, such as ("add", 7, 15).  A hash of the key
decides whether the fact is held out (about 8 %).  A held-out fact occurs in validation only, in every kind of document.
Base facts of tiny closed sets (the day after Monday, the opposite of hot, 2 + 3) are never held out: without them the
larger ones could not be learned.  A story or dialogue has a key too (plot and people): validation has held-out ones
only, training has none of them.  In sft, preference and prompts, validation asks about held-out facts only, and a hash
of the question says to which of the files it belongs, so that they share none (but for the training prompts).

Templates.  `= name cast` starts one; `@p a; b / c; d` draws one row, read as {p}, {p.b} ...; `?question => answer` is a
question about the text; everything else is the text: [a|b] is a choice, ((a ~ b ~ c)) some of the parts in any order,
<name> a macro, // a line break, and {A}, {x} ... are filled in from the cast and the tables.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

SHARES = {"story": 0.45, "description": 0.15, "dialogue": 0.15, "facts": 0.25}
TRAIN_BYTES, VAL_BYTES = 2_180_000, 250_000
LANGS = ("en", "zh")

# The questions of conversations, preferences and prompts: how often a kind is drawn, and which kinds train only.
KIND_WEIGHTS = {
    "who": 3, "compare": 2.2, "most": 2, "length": 2, "rank": 0.4, "count": 0.3, "has": 0.3, "place": 0.2, "add": 0.2,
    "next": 0.2, "sub": 0.1, "sort": 0.1, "add_word": 0.1, "sub_word": 0.1, "mul": 0.05, "after": 0.05, "before": 0.05,
    "after_n": 0.05, "before_n": 0.05, "opposite": 0.05, "class": 0.05,
}
TRAIN_ONLY = ("mul", "after", "before", "after_n", "before_n", "opposite", "class")
CHAT_COUNTS = {
    "sft": {"train": 5500, "val": 500},
    "preference": {"train": 8000, "val": 450},
    "prompts": {"train": 1800, "val": 600},  # in training drawn from the pairs, equal ones once
}
CHAT_HASH = {"sft": 40, "preference": 35, "prompts": 25}  # of 100 questions
CATEGORIES = {"wrong": 62, "rude": 14, "rambling": 11, "evasive": 13}
EVASIVE_SHARE = 0.35

# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary.  English and Chinese stand side by side, so that one row is one thing in both languages.

PEOPLE = """Tom 小明 m, Lily 小红 f, Ben 小刚 m, Anna 小丽 f, Max 大勇 m, Mia 小兰 f, Sam 阿强 m, Lucy 月儿 f,
Jack 小华 m, Emma 小芳 f, Leo 天乐 m, Nora 安妮 f"""
ANIMAL_CAST = """bear 小熊 m, rabbit 小兔 f, fox 小狐狸 m, duck 小鸭 f, cat 小猫 f, pig 小猪 m, monkey 小猴 m,
mouse 小老鼠 f, deer 小鹿 f, dog 小狗 m"""
ADULTS = "Mum 妈妈 f, Dad 爸爸 m, Grandma 奶奶 f, Grandpa 爷爷 m"
TOYS = """ball balls 皮球 个, kite kites 风筝 只, doll dolls 布娃娃 个, toy_car toy_cars 玩具车 辆, drum drums 小鼓 面,
book books 图画书 本, hat hats 帽子 顶, scarf scarves 围巾 条, bag bags 书包 个, bell bells 铃铛 个,
whistle whistles 哨子 个, toy_boat toy_boats 玩具船 只, robot robots 机器人 个, cup cups 杯子 个,
pencil pencils 铅笔 支, umbrella umbrellas 雨伞 把, lamp lamps 小灯 盏, clock clocks 闹钟 个"""
FOODS = """apple apples 苹果 个, pear pears 梨 个, peach peaches 桃子 个, banana bananas 香蕉 根,
orange oranges 橘子 个, egg eggs 鸡蛋 个, cookie cookies 饼干 块, carrot carrots 胡萝卜 根, potato potatoes 土豆 个,
tomato tomatoes 西红柿 个, strawberry strawberries 草莓 颗, lemon lemons 柠檬 个, bun buns 包子 个,
sweet sweets 糖果 颗, onion onions 洋葱 个, plum plums 李子 个"""
ANIMALS = """cat cats 猫 只, dog dogs 狗 只, bird birds 鸟 只, cow cows 牛 头, horse horses 马 匹, pig pigs 猪 头,
duck ducks 鸭子 只, rabbit rabbits 兔子 只, frog frogs 青蛙 只, mouse mice 老鼠 只, monkey monkeys 猴子 只,
bee bees 蜜蜂 只, hen hens 母鸡 只, butterfly butterflies 蝴蝶 只, goat goats 山羊 只, lion lions 狮子 头,
tiger tigers 老虎 只, snake snakes 蛇 条"""
COLOURS = """red 红色, blue 蓝色, green 绿色, yellow 黄色, white 白色, black 黑色, purple 紫色, pink 粉色, brown 棕色,
grey 灰色"""
DAYS = "Monday 星期一, Tuesday 星期二, Wednesday 星期三, Thursday 星期四, Friday 星期五, Saturday 星期六, Sunday 星期日"
MONTHS = """January 一月, February 二月, March 三月, April 四月, May 五月, June 六月, July 七月, August 八月,
September 九月, October 十月, November 十一月, December 十二月"""
# A word, its opposite, and the same in Chinese.  "x" after a row: ask for the opposite of the first word only.
OPPOSITES = """hot cold 热 冷, big small 大 小, tall short 高 矮 x, long short 长 短 x, fast slow 快 慢, up down 上 下,
happy sad 高兴 难过, open closed 开 关, new old 新 旧 x, full empty 满 空, heavy light 重 轻 x, wet dry 湿 干,
hard soft 硬 软, clean dirty 干净 肮脏, early late 早 晚, near far 近 远, left right 左 右 x, black white 黑 白,
strong weak 强 弱, day night 白天 黑夜, loud quiet 吵闹 安静, thick thin 厚 薄, deep shallow 深 浅,
first last 最先 最后, inside outside 里面 外面, front back 前 后, begin end 开始 结束, buy sell 买 卖, push pull 推 拉,
laugh cry 笑 哭, more less 多 少, rich poor 富 穷, bright dark 亮 暗, remember forget 记住 忘记, come go 来 去,
win lose 赢 输, true false 真 假, ask answer 问 答, brave afraid 勇敢 胆小, north south 北 南, east west 东 西,
safe dangerous 安全 危险, easy difficult 容易 困难, boy girl 男孩 女孩, start stop 出发 停止"""
# Groups from least to most; only members of different groups are compared.
RANKS = {
    "big": """ant 蚂蚁, bee 蜜蜂 | mouse 老鼠 | cat 猫, rabbit 兔子, duck 鸭子, hen 母鸡 | sheep 绵羊, wolf 狼 |
tiger 老虎, lion 狮子, cow 牛, horse 马 | elephant 大象 | whale 鲸鱼""",
    "heavy": """feather 羽毛, leaf 树叶 | pencil 铅笔 | apple 苹果, cup 杯子 | watermelon 西瓜 | table 桌子, bed 床 |
car 汽车 | train 火车, ship 轮船""",
    "fast": "snail 蜗牛 | turtle 乌龟 | bicycle 自行车, horse 马 | car 汽车, bus 公共汽车, train 火车 | "
    "plane 飞机 | rocket 火箭",
}
RANK_WORDS = {
    "big": ("bigger", "smaller", "大", "小"),
    "heavy": ("heavier", "lighter", "重", "轻"),
    "fast": ("faster", "slower", "快", "慢"),
}
CLASSES = """an_animal 动物: cat 猫, dog 狗, cow 牛, tiger 老虎, rabbit 兔子, bird 鸟, fish 鱼, whale 鲸鱼, horse 马
a_fruit 水果: apple 苹果, pear 梨, banana 香蕉, peach 桃子, orange 橘子, watermelon 西瓜, strawberry 草莓
a_vegetable 蔬菜: carrot 胡萝卜, potato 土豆, cabbage 白菜, onion 洋葱, cucumber 黄瓜
a_colour 颜色: red 红色, blue 蓝色, green 绿色, yellow 黄色, white 白色, black 黑色, purple 紫色
a_toy 玩具: doll 布娃娃, ball 皮球, kite 风筝, toy_car 玩具车
a_tool 工具: hammer 锤子, saw 锯子, broom 扫帚, shovel 铲子
a_vehicle 交通工具: car 汽车, bus 公共汽车, train 火车, plane 飞机"""
HOMES = {
    ("en", "human"): "in a small town|near the sea|in a village by the hills|on a quiet street|on a small farm|"
    "in a big city|beside a park|in a house with a red roof|in a tall building|at the foot of a mountain",
    ("en", "animal"): "in a green forest|under an old oak tree|near a clear river|in a small house on the hill|"
    "at the edge of the woods|by a blue lake|in a quiet valley|beside a field of flowers",
    ("zh", "human"): "一个小镇上|海边|山脚下的村子里|一条安静的街上|一座小农场里|一座大城市里|公园旁边|"
    "一间红屋顶的房子里|一座高楼里|小河边",
    ("zh", "animal"): "绿色的森林里|一棵老橡树下|清清的小河边|山坡上的小木屋里|树林边上|蓝色的湖边|安静的山谷里|"
    "一片花田旁边",
}

# ---------------------------------------------------------------------------------------------------------------------
# Macros: pieces that many templates share.

MACROS_EN = """
@when [One [|sunny |windy |cool |quiet |bright |busy ][morning|afternoon|day]|On {day}|On {day}
  [morning|afternoon]|Early one morning|After lunch|Just after breakfast|Before dinner|Late in the afternoon]
@adj [little|kind|clever|quiet|cheerful|brave|careful|busy|friendly|gentle|shy|lively]
@when2 one [|sunny |windy |cool |quiet ][morning|afternoon|evening]
@intro [{A} lived {home}.|{A} was a <adj> {A.kid} who lived {home}.|Once there was a <adj> {A.kid} named {A}.|{A} and
  {B} were [good|old|close] friends. They lived {home}.|There was once a <adj> {A.kid} called {A}. {A.He} lived
  {home}.|{A} was a <adj> {A.kid}, and {B} was {A.his} [good|best] friend.|{A} was {age} years old and lived {home}.]
@glad [happy|glad|pleased|very happy|full of joy]
@sad [sad|upset|very sad|unhappy]
@soon [Soon|After a while|At last|A little later|Before long|In the end]
@thanks [Thank you|Thank you so much|Thank you very much|Thanks a lot|Many thanks]
@away [{A} and {B} went home [with a smile|hand in hand|side by side|as the sun went down].|{A} smiled all the way
  home.|<end>|<end>]
@end [That night, {A} [slept very well|had a sweet dream|told {D} the whole story].|It was [a good day|a day to
  remember|the best day of the week] for {A}.|From then on, {A} and {B} were [even better friends|like a family|always
  there for each other].|At dinner, {A} told {D} all about it.|{D} was proud of {A}.|{A} and {B} [laughed|sang|talked]
  until the [stars|moon] came out.|And {A} never forgot that day.]
"""
MACROS_ZH = """
@when [一天|有一天|一天[早上|上午|下午|傍晚]|一个[晴朗|温暖|凉爽|安静]的[早上|下午]|{day}|{day}[早上|下午]|吃过[早饭|午
  饭]|天刚亮的时候]
@adj [善良|聪明|活泼|勇敢|细心|可爱|害羞|快乐|温和|热心]
@intro [{A}住在{home}。|{A}是一{A.m}<adj>的{A.kid}，住在{home}。|从前，{home}住着一{A.m}<adj>的{A.kid}，名叫{A}。|{A}和
  {B}是好朋友，{they}都住在{home}。|{home}有一{A.m}<adj>的{A.kid}，大家都叫{A.he}{A}。|{A}今年{age}岁，{A.he}最好的朋友
  是{B}。|{A}是一{A.m}<adj>的{A.kid}，{A.he}和{B}[常常一起玩|从小一起长大|天天见面]。]
@glad [高兴|开心|快乐|愉快]
@sad [难过|伤心]
@soon [不一会儿|过了一会儿|很快|终于|最后]
@thanks [谢谢你|太谢谢你了|真的谢谢你|多谢你]
@away [{A}和{B}[手拉手|高高兴兴地|说说笑笑地]回家了。|太阳下山了，{they}才[回家|离开]。|<end>|<end>]
@end [这天晚上，{A}[睡得很香|做了一个甜甜的梦|把这件事讲给{D}听]。|这一天，{A}过得[真开心|很快乐|特别有意思]。|从此，
  {A}和{B}[成了更好的朋友|再也没有吵过架|总是互相帮助]。|{D}知道了，[夸{A}是个好孩子|为{A}感到骄傲|笑着点了点头]。|吃晚
  饭的时候，{A}把这件事告诉了{D}。|{A}永远[记住了|忘不了]这一天。|太阳下山了，{they}才说再见。]
"""

# ---------------------------------------------------------------------------------------------------------------------
# Stories.

STORIES_EN = """
= lost any
@q in the tall grass; {A} had run there the day before / under the big tree; the wind had blown it there / behind the
  garden gate; a puppy had carried it there / under a pile of leaves; it had fallen out of a bag / near the old well;
  {A} had stopped there to drink / beside the pond; {A} had fed the ducks there
<intro> {A} had a {col} {x}. [It was a gift from {D}|{A.He} kept it in {A.his} room|{A.He} liked it more than anything
else| {A.He} took it everywhere]. <when>, {A} [could not find the {x}|looked for the {x}, but it was gone|wanted the
{x}, but it was not there]. {A.He} [looked|searched] [under the bed|behind the door|on the shelf|in the kitchen] and
[under the table|in every box|behind the chair|in the cupboard], but [there was nothing|it was not there]. {A} [felt
<sad>|wanted to cry|was worried]. [//|] {B} came [to play|to visit|along the path] and [saw {A.his} face|asked, "What
is wrong?"|sat down beside {A.him}]. "I lost my {x}," said {A}. "[Do not worry|Do not be sad|Let me help you]," said
{B}. "[Where did you play yesterday|Where did you see it last|When did you have it last]?" {A} thought [hard|for a
while|about it]. "[Outside, I think|I had it when I went for a walk|I took it out with me]," {A.he} said. [So they went
outside together|They ran out at once|They put on their shoes and went out]. [They looked here and there.|{A} looked on
the left, and {B} looked on the right.|They walked slowly and looked at the ground.|{B} asked everyone they met.]
<soon>, {B} [saw something {col}|gave a happy shout|stopped and pointed]. {B} had found the {x} {q.a}! {q.b}. [//|] {A}
[hugged {B}|jumped for joy|laughed]. "<thanks>, {B}! [You are a true friend|You have sharp eyes|I could not find it
without you]," said {A}. [From then on, {A} put the {x} away every night.|After that day, {A} took better care of the
{x}.|] <away>
?Who found the {x}? => {B}
?What did {A} lose? => the {x}
?Where was the {x}? => {q.a}
= share any
<intro> [On {day}|On {day} morning|One [sunny|warm|bright] morning|One day], {A} and {B} [went for a walk|went up the
hill|walked to the lake|sat in the garden]. {A} had {n.s} {f.s} in {A.his} [bag|basket|pocket]. {B} had [nothing to
eat|left {B.his} lunch at home|dropped {B.his} lunch in the mud]. [At noon|When the sun was high|After a long walk],
they sat down [under a tree|on a big rock|on the soft grass] to [rest|eat]. {A} took out the {f.s}. {B} looked [at the
ground|away|at the clouds] and said nothing. "[Are you not hungry|Why do you not eat|Where is your lunch], {B}?" asked
{A}. "[I have no food today|I do not have any food|I have nothing to eat]," said {B} [softly|in a low voice| with a red
face]. [//|] {A} [thought for a moment|looked at the {f.s}|was hungry too]. [{A.He} wanted all of them, but a friend is
worth more than food.|{A.He} did not want to eat alone.|{A.He} knew what it was like to be hungry.] {A.He} gave {n.a}
{f.s} to {B} and kept {n.b}. "[Here you are|These are for you|Let us share]," said {A}. {B} was <glad>. "<thanks>,
{A}," said {B}. [They ate slowly and watched the birds.|The {f.s} tasted sweet and fresh.|They ate and told each other
jokes.] [//|] The next day, {B} [came to {A}'s door|waited for {A} on the path|met {A} again] with [a warm cake|a jar
of honey|a big pie|a bowl of soup|some hot bread]. "Yesterday you shared with me," said {B}. "Today I want to share
with you." [Good things grow when we share them.|They both felt warm inside.|{A} gave {B} a big smile.] <away>
?How many {f.s} did {A} give to {B}? => {n.a}
?Who had {n.s} {f.s}? => {A}
= rain any
@s an old barn; the hay was dry and soft; the old barn / a small cave; it was dark but dry; the small cave / an empty
  house; the windows had no glass; the empty house / a wooden shed; there were old tools on the wall; the wooden shed /
  a little hut; there was some dry wood; the little hut
<intro> <when>, {A} and {B} [went out to fly a kite|went to pick flowers|went to look for berries|were playing by the
river]. The sky was [blue|clear|bright] and [the birds sang|the air was warm|there was no wind]. [But then|After an
hour|All at once], dark clouds came over the [hills|trees|fields]. [Drop by drop, it began to rain.|It started to rain
hard.|Big drops fell on their heads.] "[Oh no!|Look at the sky!|What shall we do now?]" cried {A}. {B} had [one small
umbrella|a thin coat|one big leaf], but it was [too small for two|not enough for both|soon wet through]. {A} [was cold
and began to shake|slipped in the mud|had wet feet]. [//|] "[Take my hand|Come with me|Follow me]," said {B}. "I can
see {s.a}." They ran [as fast as they could|through the wet grass|side by side]. Inside {s.c}, {s.b}. [They sat close
together to keep warm.|They told stories while they waited.|They counted the drops and listened to the wind.] {A} was
afraid of the [thunder|lightning], so {B} [sang a song|held {A.his} hand|told a funny story]. <soon>, the rain stopped.
[The sun came out again.|A rainbow stood over the [hill|river|field].|The leaves were shining with water.] "[Look, how
pretty|How beautiful|I am not afraid now]!" said {A}. They [jumped over the puddles|walked home in the fresh air|shook
the water from their clothes]. At home, {D} gave them [hot soup|dry clothes|warm milk|ginger tea]. <end>
?Where did {A} and {B} hide from the rain? => in {s.a}
?Who saw {s.a}? => {B}
= race any
@g the old tree / the bridge / the gate / the top of the hill / the big rock / the pond
<intro> {A} could run [very fast|like the wind], and {A.he} [liked to talk about it|often laughed at slow runners|was
proud of it]. <when>, {A} said to {B}, "[Let us have a race!|Can you beat me?|I am faster than you!]" "[All
right|Fine|Let us try]," said {B}. "We will run to {g}." {C} [drew a line on the ground|counted to three|waved a flag],
and off they went. [{A} was soon far in front.|{A} ran ahead at once.|{B} was far behind.] [//|] [{A} looked back and
laughed. "I have so much time," {A.he} said, and {A.he} [lay down under a tree|stopped to eat some berries|sat down to
look at the clouds]. [The sun was warm, and {A} fell asleep.|{A} closed {A.his} eyes and forgot the race.] {B} did not
stop. Step by step, {B} [walked on|kept going|went past {A}]. When {A} woke up, {B} was already at {g}. {B} had won the
race! "[Slow and steady is better than fast and lazy|I only kept going|I did not stop]," said {B}. {A} [said
sorry|learned a lesson|never laughed at a slow runner again]. The winner was {B}.|Then {A} [heard a cry|saw something
on the road]. A small [bird|mouse|turtle|kitten] was [caught in a net|lying on its back|stuck in a hole]. {A} [could
win the race, or {A.he} could help|wanted to win, but {A.he} stopped|did not think twice]. {A.He} [freed it with
care|helped it gently|took it to a safe place]. {B} ran past and reached {g} first. "You won, {B}," said {A}. "[But you
did something better|But you have a kind heart]," said {B}. {C} agreed. The winner of the race was {B}, but everyone
clapped for {A}.|[Near {g}|Half way], {B} [fell over a stone|hurt {B.his} foot|slipped and fell]. {A} heard {B.him} cry
out. {A} [turned round|ran back] and [helped {B} to stand up|cleaned the dirt from {B.his} knee]. "[Can you walk|Are
you hurt]?" asked {A}. "Only a little," said {B}. They walked the last steps together and [touched {g} at the same
time|reached {g} side by side]. {C} said, "You are both winners."] <away>
?Who wanted to race with {B}? => {A}
?Where did they run to? => {g}
= plant any
@p sunflower; a yellow flower; It was taller than {A} / tomato; red tomatoes; They were round and sweet / bean; long
  green beans; There were enough for a big soup / strawberry; small red berries; They tasted like sugar / pumpkin; a
  huge orange pumpkin; It was too heavy to lift / rose; a pink rose; It smelled very sweet
<intro> <when>, {D} gave {A} [a tiny|one small|a little brown] {p.a} seed. "[Plant it and be patient|Take good care of
it|Water it every day]," said {D}. {A} [dug a hole|made a hole in the soft earth|filled a pot with earth] and put the
seed in. {A.He} watered it [every morning|every evening|each day]. [One day went by|Three days went by|A week went by],
but nothing [came up|happened]. {A} was <sad>. "[My seed is asleep|Maybe the seed is dead|It will never grow]," {A.he}
told {B}. {A.He} wanted to [dig it up|give up|throw the pot away]. [//|] "[Wait|Do not do that|Do not give up]," said
{B}. "[A seed needs time|Good things take time|It is working under the ground]." So {A} [waited|went on with {A.his}
work|watered it again]. {B} [came to help|pulled the weeds|brought more water]. [Then the sun shone for many days.|Then
a soft rain fell at night.] One morning, {A} saw [a small green leaf|a tiny green shoot|two little leaves]. "[Look|Come
quick|It is alive], {B}!" {A.he} shouted. [Week after week|Day after day], the plant grew [taller and taller| bigger
and bigger]. In [June|July|August|September], it gave {p.b}. {p.c}. [//|] {A} [shared it with {B}|showed it to
{D}|danced around the garden]. "[You waited well|You were patient|You worked hard]," said {D}. [{A} kept some seeds for
the next year.|{A} gave one seed to {B}.|{A} learned that waiting can be sweet.] <end>
?Who gave {A} the seed? => {D}
?What seed did {A} plant? => a {p.a} seed
= cook any
@s apple pie; sugar; rolled the dough / vegetable soup; salt; cut the carrots / a birthday cake; eggs; mixed the flour
  / pancakes; milk; heated the pan / fried rice; eggs; washed the rice / dumplings; flour; cut the meat
<intro> <when>, {A} wanted to make {s.a} [for {D}|for dinner|for {C}]. {A} [put on an apron|washed {A.his} hands|read
the recipe twice] and {s.c}. [Then {A.he} opened the cupboard.|Then {A.he} looked on the shelf.|But {A.he} stopped
suddenly.] One thing was missing: {s.b}! "[What can I do now?|I cannot cook without it!|What a problem!]" said {A}.
[The shop was closed.|The shop was far away.|It was too late to go to the shop.] [//|] {A} [ran|went|hurried] to {B}
and knocked on the door. "{B}, do you have any {s.b}?" asked {A}. "[Yes, I do|Of course|I have some]," said {B}. {B}
gave {A} [some|a bag of|plenty of] {s.b}. "[May I help you|Can I come too|Shall we cook together]?" asked {B}. "[Yes,
please|That is a great idea|Two cooks are better than one]!" said {A}. In the kitchen, {A} [stirred|mixed
everything|watched the fire] and {B} [washed the bowls|set the table| added the {s.b}]. [Flour flew everywhere, and
they laughed.|It was hard work, but it was fun.|Once {A} almost burned {A.his} finger.|The kitchen was a mess, but they
did not mind.] <soon>, the food was ready. It smelled [wonderful|very good|sweet and warm]. [//|] They took it to the
table. {D} [tasted it|took a bite|ate a little] and [smiled|closed {D.his} eyes|nodded]. "[This is delicious|How good
it is|I want some more]!" said {D}. {A} said, "{B} helped me." {B} [laughed|turned red|was <glad>]. [Afterwards they
washed all the plates.| Nothing was left on the plates.|] <end>
?Who gave {A} some {s.b}? => {B}
?What did {A} want to make? => {s.a}
= broken any
@r glue; stuck the pieces together / a needle and thread; sewed it up / paint and a brush; made it look new / tape; put
  tape on the crack
<intro> {B} had a [new|pretty|fine] {col} {x}. {B} let {A} [hold|use|borrow] it [for a day|for an hour|after school].
"[Please be careful|It is dear to me|Take good care of it]," said {B}. {A} [was careful at first|promised to be
careful|nodded]. But <when2>, {A} [tripped over a chair|ran too fast|did not look where {A.he} was going], and the {x}
[fell on the floor|hit the wall|fell down the stairs]. It was broken! {A} was [afraid|ashamed|shocked]. {A.His} heart
beat fast. "[What will {B} say?|{B} will be angry with me!]" {A.he} thought. [//|] [{A} hid the {x} under the bed.|{A}
put the {x} in a dark box.|{A} wanted to run away.|{A} wanted to say that the cat did it.] But {A} could not
[sleep|eat|play]. [A lie felt like a heavy stone.|The secret was too heavy.] <soon>, {A} [went to {D}|told {D}
everything|asked {D} for help]. "[Tell the truth|Be brave and be honest|Say that you are sorry]," said {D}. So {A} took
the {x} [back to {B}|to {B.his} house]. "I broke your {x}," said {A}. "I am [so|very] sorry." [//|] {B} was <sad> [at
first|for a moment]. Then {B} said, "[Thank you for telling me|It was brave to tell me|I am glad you told the truth]."
{D} brought {r.a}. {A} {r.b}, and {B} [held it still|helped]. [It was not perfect, but it was good enough.|Now it
looked better than before.|After an hour, it was whole again.] "[I forgive you|We are still friends|Let us play]," said
{B}. [The truth had saved their friendship.|{A} felt light and free.|{A} was more careful after that.] <end>
?Who broke the {x}? => {A}
?Whose {x} was it? => {B}
?What did {D} bring? => {r.a}
= birthday any
@g a bracelet of shells; by the sea / a picture of their house; at the table / a little wooden bird; in the shed / a
  crown of flowers; in the field / a song; by the window / a paper lantern; on the floor
It was [almost|nearly] {B}'s birthday. {A} wanted to give {B} [something special|a present|a nice gift]. [{A.He} opened
{A.his} money box|{A.He} looked in {A.his} pockets], but there [was nothing there|were only {m.d} coins]. The {x} in
the shop cost {m.a} coins. {A} [sat on the steps and thought|did not know what to do|felt <sad>]. [//|] {D} asked,
"[What is wrong|Why are you so quiet], {A}?" "I cannot buy a gift for {B}," said {A}. "[The best gifts are made by
hand|A gift does not have to cost money|A gift from the heart is best]," said {D}. {A} had an idea. {A.He} sat {g.b}
and made {g.a}. [It took the whole day.|It was not easy.|{A.He} began again three times.] {C} came by and [helped a
little|said, "How nice!"|brought some {col} paper]. [//|] On {day}, there was a party. [There were balloons on the
door.|There was a cake with {age} candles.|Everyone sang a song.|The room was full of friends.] {C} gave {B} a {col}
{y}. Then {A} gave {B} {g.a}. {A} [was a little afraid|waited without a word|held {A.his} breath]. {B} [was quiet for a
moment|looked at {A}|opened {B.his} eyes wide]. "[Did you make this yourself|You made this for me]?" {B} asked. "Yes,"
said {A}. "[It is the best gift of all|I love it|I will keep it for ever]!" said {B}. [They all ate cake and
danced.|Then they played games until dark.|{A} was the happiest guest.] <end>
?Who gave {B} a {y}? => {C}
?What did {A} make for {B}? => {g.a}
= night any
@s tap, tap, tap; a branch at the window; The wind was moving it / scratch, scratch; a little mouse; It wanted some
  cheese / whoo, whoo; an owl in the tree; It was singing to the moon / drip, drip, drip; the kitchen tap; Someone had
  not closed it / bang, bang; the garden gate; It was not closed / meow, meow; a lost kitten; It was cold and hungry
<intro> [One night|On {day} night|One dark night|Late one night], {A} could not sleep. [The moon was behind the
clouds.|The house was very still.|Everyone else was asleep.|The wind was blowing outside.] Then {A} heard a noise:
"{s.a}!" {A} [pulled the blanket over {A.his} head|sat up in bed|held {A.his} pillow tight]. "[Is it a monster|Who is
there|What is that]?" {A.he} whispered. The noise came again: "{s.a}!" {A.His} heart went [boom, boom|faster and
faster]. [//|] {A} woke {B}, who was [staying for the night|sleeping in the next bed]. "[Did you hear that?|Listen!]"
said {A}. {B} listened. "[I am afraid too|It sounds strange], but [let us look|two are braver than one|we must find
out]," said {B}. {A} took [a lamp|a candle|a small light] and {B} took [a broom|a pillow|a long spoon]. They [walked on
their toes|went slowly down the stairs|held hands in the dark]. [The floor was cold.|Their shadows were long on the
wall.|Step by step they came closer.] {A} [opened the door|held up the light|took a deep breath] and looked. It was
only {s.b}! {s.c}. [//|] {A} and {B} [began to laugh|looked at each other and laughed|felt silly but happy]. "[We were
afraid of nothing|That is not a monster at all|What brave heroes we are]," said {B}. [They made it quiet and went back
to bed.|They fixed the problem and drank some milk.|They told {D} about it in the morning.] [When you look at a fear,
it gets smaller.|After that, {A} was not afraid of the dark.|{A} closed {A.his} eyes and slept until the sun came up.]
?What made the noise? => {s.b}
?Who took a broom? => {B}
= market any
<intro> <when>, {D} [gave {A} a basket and {n.pay} coins|called {A} and gave {A.him} {n.pay} coins]. "Please buy some
{f.s} and some {g.s}," said {D}. "[Do not forget|Be careful on the road|Come back before dark]." {A} [walked to the
market|ran down the road|said the words again and again: {f.s}, {g.s}]. [The market was full of people.|The market was
loud and bright.|There were so many good things to see.] {A} saw [a man with a monkey|a toy shop|a big drum|a stall
with sweets] and almost forgot [what to buy|the list]. [//|] Then {A} met {B}. "[What are you looking for|What do you
need]?" asked {B}. "{f.s} and {g.s}," said {A}. "[The best ones are over there|Follow me|I know a good stall]," said
{B}. The {f.s} cost {n.a} coins, and the {g.s} cost {n.b} coins. That was {n.s} coins in all. {A} gave the [seller|old
woman|farmer] {n.pay} coins and got {n.back} back. [//|] [On the way home, {A} counted the money. There were {extra}
coins too many! {A} [could keep them|could buy sweets with them], but {A.he} [ran back|turned round at once]. "You gave
me too much," said {A}. "[What an honest child|How honest you are]," said the seller, and gave {A} [a flower|a ripe
plum|a kind smile].|On the way home, the basket [was too heavy for {A}|broke]. {B} helped {A} to carry the food. "[Two
are stronger than one|It is easy with two]," said {B}. {A} gave {B} [one of the {f.s}|one of the {g.s}] to say thank
you.] {D} [looked into the basket|was waiting at the door|counted everything] and said, "[Well done|You did it all by
yourself|You forgot nothing], {A}!" <end>
?How many coins did the {f.s} and the {g.s} cost in all? => {n.s}
?How many coins did {A} get back? => {n.back}
= learn human
@k swim; at the pool; swallowed some water; swam to the other side / ride a bicycle; in the park; fell on the grass;
  rode all the way round the park / skate; on the frozen lake; sat down hard on the ice; made a big circle on the ice /
  play the flute; in the garden; made a terrible sound; played a whole song / climb a rope; at school; slipped down;
  touched the very top / juggle; in the yard; dropped every ball; kept three balls in the air
<intro> {A} could not {k.a}, but {B} could. [{A} watched {B} every day|{A} felt a little left out|{A} wished to be like
{B}]. "[I will never learn it|It is too hard for me|I am too small]," said {A}. "[Nobody can do it on the first
day|Everyone starts small|I could not do it either at first]," said {B}. "[Let me teach you|I will show you|Come and
try]." [//|] <when>, they met {k.b}. {A} tried once and {k.c}. {A} tried again and {k.c} again. [Some children
laughed.|{A}'s face was red.|{A} was close to tears.] "I want to stop," said {A}. {B} [did not laugh|shook {B.his}
head|took {A.his} hand]. "[One more time|Look straight ahead|Do not think about falling]," said {B}. [{D} watched and
clapped.|{C} called, "You can do it!"|{C} showed {A} a little trick.] {A} [took a deep breath|closed {A.his} mouth
tight|counted to three] and tried [a third time|once more]. This time it was [a little better|not so bad]. [//|] {A}
practised on {day}, and the next day, and the day after that. [Every day it was a little easier.|{A.His} arms and legs
hurt, but {A.he} did not stop.|{B} came every day to help.] [After two weeks|At the end of the month|One morning], {A}
{k.d}! "[I did it|I can do it|Look at me]!" shouted {A}. {B} [clapped|cheered|jumped up and down]. "[I knew it|You
never gave up|You worked so hard]," said {B}. [Now {A} teaches the smaller children.|Now they {k.a} together every
week.|"<thanks> for teaching me," said {A}.] <end>
?What did {A} learn to do? => {k.a}
?Who taught {A}? => {B}
= hurt any
@b bird; its wing was hurt; some seeds; flew up into the sky / hedgehog; its foot was hurt; some apple; walked into the
  bushes / kitten; its leg was hurt; some fish; ran along the wall / butterfly; its wing was wet; a drop of honey; flew
  over the flowers / turtle; its shell was stuck between two stones; some leaves; crawled away to the pond
<intro> <when>, {A} was [walking home|playing outside|picking flowers] when {A.he} heard a [soft|strange|weak] sound.
[Behind a bush|Under the fence|Beside the road], {A} found a little {b.a}. {b.b}, and it could not get away. "[You poor
thing|Do not be afraid|I will help you]," said {A}. {A.He} [picked it up very gently|put it in {A.his} hat|carried it
home in a box]. [//|] {A} did not know what to do, so {A.he} went to {B}. {B} [looked at it carefully|had read a book
about animals|wanted to help too]. "It needs [rest|quiet|a warm place] and {b.c}," said {B}. {B} brought {b.c}, and {A}
made a soft bed [of dry grass|from an old scarf|in a basket]. The {b.a} [ate a little| looked at them with bright
eyes|shook with fear at first]. [Every morning {A} brought fresh water.|{A} and {B} took turns to watch it.|At night
{A} got up to look at it.] {D} said, "[You are good doctors|You are doing well|Be gentle with it]." [//|] After {days}
days, the {b.a} was [strong|well|lively] again. "Can we keep it?" asked {A}. "[It wants to be free|Its home is
outside|Its mother is waiting]," said {B}. {A} was a little sad, but {A.he} knew that {B} was right. They took it
[outside|back to the garden]. The {b.a} {b.d}. [It turned and looked back once.|"Goodbye, little friend!" called
{A}.|{A} waved for a long time.] [A week later, it came back to visit.|Sometimes {A} still sees it in the garden.|To
help and then let go is also love.] <end>
?Who found the {b.a}? => {A}
?Who brought {b.c}? => {B}
= newfriend human
[On {day}|On {day} morning|One morning|One day], a new [child|pupil] came to the class. {B.His} name was {B}. {B} [came
from a far city|had just moved to the town|did not know anyone] and [looked at the floor|spoke very little|sat alone at
the back]. At lunch, {B} [sat by the window|stood under a tree|ate alone]. {A} [saw this from the other side of the
room|was playing with {C}|stopped eating]. "[Why does {B} not play with us|Why does {B} look so lonely]?" {A} asked
{C}. "[Maybe {B} is shy|I do not know|Let us ask]," said {C}. [//|] {A} remembered {A.his} own first day. [{A.He} had
felt very small.|Nobody had talked to {A.him} then.|{A.His} heart had been heavy.] So {A} took {A.his} {x} and walked
over. "Hello, I am {A}. [Do you want to play|Would you like to see my {x}|Can I sit here]?" {B} [looked up|was
surprised|gave a tiny smile]. "[Yes, please|I would like that|All right]," said {B}. {C} came too and brought [some
{f.s}|a ball|a rope]. [They played until the bell rang.|They talked about animals and stars.|They found out that they
all liked {f.s}.] [//|] After school, {B} said, "[I was afraid this morning|I thought nobody would talk to me]. Now I
am <glad>." The next morning, {B} brought a {col} {y} for {A}. "[I made it for you|This is for my first friend here],"
said {B}. [The three walked home together every day.|Soon {B} knew everyone in the class.|{A} learned that one kind
word can change a day.] <end>
?Who was new in the class? => {B}
?Who gave {A} a {y}? => {B}
= stuck any
@v ball / hat / paper plane / kite / scarf / balloon
@t a long stick; it was too short / a rope; it did not reach / a ladder; it was broken / a small stone; it missed
@h a tall giraffe; reached up with a long neck / a friendly owl; flew up and pushed it down / a clever crow; pulled it
  free with its beak / a quick squirrel; ran up the tree in no time
<intro> <when>, {A} and {B} were playing with {A}'s {col} {v}. [The wind was strong.|They ran up and down the
hill.|They laughed and shouted.] Suddenly {B} threw it too high, and the {v} was stuck in a tree! "[Oh no|My {v}|It is
gone]!" cried {A}. "I am sorry," said {B}. "[I did not mean it|I will get it back|Let us think]." First {A} jumped, but
the branch was too high. Then {B} [tried|used|got] {t.a}, but {t.b}. [They shook the tree, but only leaves fell
down.|{A} stood on {B}'s back, but they both fell over.|They shouted at the {v}, but of course it did not move.] [//|]
{A} [sat down and was <sad>|kicked the tree|wanted to give up]. [Just then|At that moment], {h.a} came by. "[Why the
long faces|What are you looking at|Can I help]?" it asked. {A} told the story. "[That is easy|No problem|Leave it to
me]," it said, and it {h.b}. The {v} fell right into {A.his} hands! [//|] "<thanks>!" said {A}. "[How can we thank
you|What can we do for you]?" asked {B}. "[Let me play with you|Just be kind to others|A {f} would be nice]," it
answered. So {B} [gave it a {f}|ran home and brought a {f}]. [They played together all afternoon, but far from the
trees.|The next time, {B} threw more carefully.|When one way does not work, ask for help.] <away>
?Who threw the {v} too high? => {B}
?What was stuck in the tree? => the {v}
= cake any
@w crumbs on {A.his} nose; the crumbs / sugar on {A.his} face; the sugar / jam on {A.his} chin; the jam / cream on
  {A.his} mouth; the cream
<intro> {D} had baked {n.s} [small cakes|sweet cakes|honey cakes] for a [party|picnic|school fair]. "[Do not touch
them|They are for tomorrow|Nobody eats one today]," said {D}, and put them [on the table|by the window|on a blue
plate]. <when2>, {A} [smelled the cakes|came into the kitchen|passed the door]. They looked so [sweet|soft|good]! "[One
will not matter|Just one little bite|Nobody will see]," thought {A}. {A} ate one, and then another, until {n.a} cakes
were gone and only {n.b} were left. [//|] When {D} came back, {D.he} counted the cakes. "[Who ate the cakes|Where are
the other {n.a} cakes]?" {D.he} asked. {B} said, "It was not me." {A} [looked at the floor|said nothing|turned red] and
then said, "[Maybe it was a mouse|Maybe the wind took them]." But {B} saw {w.a} and [pointed|laughed|looked at {A}].
"[What about {w.b}|Then where did {w.b} come from]?" asked {B}. {A} [began to cry|could not lie any more|hung {A.his}
head]. "I ate them," said {A}. "I am sorry." [//|] {D} was [quiet|not happy], but {D.he} [did not shout|took {A}'s
hand]. "[A lie makes a small mistake big|We all make mistakes, but we must be honest]," said {D}. "[Help me to bake new
ones|Let us make {n.a} more]." {A} and {B} worked all evening. {A} [beat the eggs|mixed the butter and sugar] and {B}
[watched the oven|washed the dishes]. Soon there were {n.s} cakes again. [The next day, everyone loved them.|{A} did
not eat even one.|{D} gave each of them a hug.] <end>
?Who ate the cakes? => {A}
?How many cakes were left? => {n.b}
= sick any
<intro> [Every morning|Each day], {A} met {B} [at the corner|by the bridge|under the big tree]. But <when2>, {B} did
not come. {A} [waited and waited|looked up and down the road|called {B.his} name]. "[Something must be wrong!|Where can
{B} be?]" thought {A}. {C} came by and said, "{B} is sick. {B.He} has [a cold|a fever|a bad cough|a sore throat] and
must stay in bed." {A} was <sad>. "[Let us cheer {B} up,|What can we do for {B}?|We should visit {B},]" said {A}. [//|]
{A} made [hot soup|some tea with honey|a warm cake], and {C} brought [some flowers|{n.a} {f.s}|a bag of {f.s}]. {A}
also took {A.his} {x}, because {B} liked it so much. [It was a long way, and it was cold.|It was windy, but they did
not stop.|They walked through the rain.] {B} lay in bed with [a red nose|tired eyes|a hot head]. When {B.he} saw
{B.his} friends, {B.he} [sat up|smiled|forgot the pain]. "[You came all this way|I was so lonely]!" said {B}. {C}
[opened the window|told a joke|read a story aloud], and {A} [gave {B} the {x}|put the {x} on the bed]. "[You may keep
it until you are well|It will keep you company]," said {A}. [//|] {D} said, "[Rest and drink a lot of water|Friends are
the best medicine]." After {days} days, {B} was [well|strong] again. {B} [ran to {A}'s house|knocked at {A}'s door] and
gave back the {x}. "<thanks>," said {B}. "[You made me well|Your visit helped more than the medicine]." [Then they ran
out to play.|They met at the same place as before.] <end>
?Who was sick? => {B}
?What did {A} take to {B}? => {A.his} {x}
"""

STORIES_ZH = """
= lost any
@q 草丛里;昨天{A}在那里跑过步 / 大树下面;是风把它吹到那里的 / 花园门后面;是一只小狗把它叼过去的 / 一堆落叶下面;它是从包
  里掉出来的 / 水井旁边;{A}曾经在那里喝过水 / 池塘边上;{A}在那里喂过鸭子
<intro>{A}有{x.one}，[是{D}送的|{A.he}非常喜欢|它是{col}的，很漂亮|{A.he}走到哪里都带着它]。<when>，[{x}不见了|{A}发现
{x}丢了|{A}怎么也找不到{x}]。{A.he}找遍了[床底下|门背后|书架上|厨房里]和[桌子下面|每个箱子|椅子后面|柜子里]，[可是什么
也没有|都没有找到]。{A}[<sad>极了|急得快要哭了|心里很<sad>]。[//|]这时候，{B}[来找{A}玩|从门口经过|走了过来]，[问：“你
怎么了？”|看见{A}愁眉苦脸的样子。|在{A}身边坐了下来。]“我的{x}丢了。”{A}说。“[别着急，我来帮你|别难过，我们一起找|不要
担心，会找到的]。”{B}说，“[你昨天在哪里玩过|你最后一次看见它是在哪里|你再想一想，去过什么地方]？”{A}想了[想|很久|一会儿
]，说：“[好像是在外面|我带着它出去散过步|我记得带它出过门]。”[于是{they}一起出了门|{they}穿上鞋子，跑到外面]。[{A}找左
边，{B}找右边。|{they}一边走一边低头看。|{they}东看看，西看看。|{B}逢人就问。]<soon>，{B}[大声喊：“快来看！”|高兴地叫了
起来。|停下来，用手一指。]原来{x}在{q}！{q.b}。[//|]{A}[高兴得跳了起来|抱住了{B}|笑了]，说：“<thanks>！[你的眼睛真亮|没
有你，我就找不到它了|你真是我的好朋友]！”[从那以后，{A}每天晚上都把{x}收好。|以后，{A}更加爱护{x}了。|]<away>
?谁找到了{x}？ => {B}
?{A}丢了什么？ => {x}
?{x}在哪里？ => {q}
= share any
<intro>[{day}|{day}上午|一个[晴朗|温暖]的上午|有一天]，{A}和{B}[去爬山|去湖边玩|到公园散步|去田野里看花]。{A}的[包|篮子
|口袋]里有{n.s}{f.m}{f}，{B}却[什么吃的也没带|把午饭忘在家里了|不小心把午饭掉进了泥里]。[到了中午|走了很远的路以后|太阳
升得高高的]，{they}坐在[大树下|石头上|草地上]休息。{A}拿出了{f}。{B}[低下头|看着天上的云|转过身去]，不说话。“{B}，[你不
饿吗|你怎么不吃呢|你的午饭呢]？”{A}问。“[我没有带吃的|我今天没有午饭]。”{B}[小声|红着脸]说。[//|]{A}[看了看手里的{f}|想
了一会儿|自己也很饿]。[{A.he}想：朋友比{f}更重要。|{A.he}知道饿肚子的滋味不好受。|{A.he}不想一个人吃。]于是，{A}给了{B}
{n.a}{f.m}{f}，自己留下{n.b}{f.m}。“[给你吃吧|我们一起吃吧|这些是你的]！”{A}说。{B}<glad>地说：“<thanks>，{A}！”[{f}又
新鲜又好吃。|{they}一边吃一边看小鸟。|{they}边吃边讲笑话，笑声传得很远。][//|]第二天，{B}带来了[一块蛋糕|一罐蜂蜜|一碗
热汤|一盘饺子|一袋花生]，对{A}说：“昨天你分给我吃，今天[我也要分给你|换我请你吃]。”[好东西大家分享，会变得更好吃。|
{they}心里都暖暖的。|{A}笑得像一朵花。]<away>
?{A}给了{B}几{f.m}{f}？ => {n.a}
?谁带了{n.s}{f.m}{f}？ => {A}
= rain any
@s 一座旧谷仓;里面的干草又软又干;旧谷仓 / 一个山洞;里面有点黑，但是很干;山洞 / 一间空房子;窗户上没有玻璃;空房子 / 一间
  木屋;墙上挂着旧工具;木屋 / 一座小亭子;亭子里有一张石凳;小亭子
<intro><when>，{A}和{B}[去放风筝|去采野花|去摘野果|在河边玩]。[天空蓝蓝的|阳光很好|天气很暖和]，[小鸟在唱歌|一点风也没
有|蝴蝶飞来飞去]。[忽然|没想到|过了一个小时]，[天上飘来一大片乌云|天一下子黑了|刮起了大风]，接着就下起了[大雨|雨]。“[哎
呀|糟糕]，[我们怎么办？|衣服要湿了！]”{A}叫道。{B}只有[一把小伞|一件薄外衣|一片大叶子]，[两个人不够用|很快就湿透了|挡不
住这么大的雨]。{A}[冷得发抖|在泥里滑了一跤|的鞋子里全是水]。[//|]“[跟我来|快拉住我的手|别怕]，”{B}说，“我看见那边有{s}
。”{they}[飞快地跑|手拉手跑|踩着水跑]到{s.c}里。{s.b}。[{they}紧紧地靠在一起。|{they}一边等一边讲故事。|{they}听着雨声
，数着雨点。]轰隆隆，打雷了，{A}很害怕。{B}就[唱歌给{A.he}听|握住{A.he}的手|讲了一个笑话]。<soon>，雨停了，[太阳又出来
了|天边出现了一道彩虹|树叶上的水珠闪闪发亮]。“[快看，多美啊|真漂亮|我现在不怕了]！”{A}说。{they}[跳过一个个水坑|吸着新
鲜的空气|抖掉身上的水]，一路走回家。{D}给{they}端来了[热汤|姜茶|热牛奶|热乎乎的粥]。<end>
?{A}和{B}在哪里躲雨？ => {s.c}里
?谁看见了{s}？ => {B}
= race any
@g 大树下 / 小桥边 / 山顶上 / 大石头旁 / 池塘边 / 村口
{A}跑得[特别快|像风一样快]，[总是很骄傲|常常笑别人跑得慢|到处夸自己]。<when>，{A}对{B}说：“[我们来比赛跑步吧！|你敢和我
赛跑吗？|你一定跑不过我！]”{B}说：“[好啊|行|比就比]！”{they}说好跑到{g}。{C}[画了一条线|数了三下|挥了挥小旗]，比赛开始
了。[{A}一下子冲到了前面。|{A}跑在最前面。|{B}落在了后面。][//|][{A}回头看了看，笑着说：“[还早呢|时间多得很]。”{A.he}就
[躺在树下|坐在草地上]休息，[不知不觉睡着了|闭上眼睛，忘了比赛]。{B}没有停下来，一步一步[往前走|坚持跑]。等{A}醒来的时候
，{B}已经到了{g}。{B}赢了！{B}说：“[我只是没有停下来|慢一点没关系，不停就好]。”{A}[脸红了|低下了头]，[再也不笑别人慢了|
明白了骄傲会让人落后]。赢的是{B}。|忽然，{A}听见路边有哭声。原来一只小[鸟|老鼠|乌龟|刺猬][被网缠住了|掉进了坑里|翻了身
，起不来]。{A}[很想赢，可是还是停了下来|想也没想就停了下来]，[小心地救了它|轻轻地帮了它]。{B}先跑到了{g}。{A}说：“{B}，
你赢了。”{B}说：“[可是你做了更好的事|你的心最善良]。”{C}也点点头。比赛的第一名是{B}，大家却都为{A}鼓掌。|[快到{g}的时候
|跑到一半]，{B}[被石头绊倒了|摔了一跤|扭伤了脚]。{A}听见{B}的叫声，[马上跑回来|转身就往回跑]，[把{B}扶了起来|拍掉{B}身
上的土]。“[疼不疼|你还能走吗]？”{A}问。“[有一点疼|没事]。”{B}说。{they}[手拉手走到了{g}|一起走完了最后一段路]。{C}说：“
你们两个都是第一名！”]<away>
?{A}和谁赛跑？ => {B}
?{they}要跑到哪里？ => {g}
= plant any
@p 向日葵;开出了一朵金黄的花;它比{A}还高 / 西红柿;结出了红红的果子;果子又圆又甜 / 豆角;结出了长长的豆角;可以煮一大锅汤
  / 草莓;结出了小小的红果子;味道像糖一样甜 / 南瓜;结出了一个大南瓜;重得抱不动 / 月季;开出了粉色的花;满院子都是香味
<intro><when>，{D}给了{A}一粒{p}种子，说：“[种下它，要有耐心|好好照顾它|记得天天浇水]。”{A}[在院子里挖了一个坑|在花盆里
装满了土|松了松土]，把种子[种下去|埋好]。{A.he}每天[早上|傍晚]都给它浇水。[一天过去了|三天过去了|一个星期过去了]，[土里
什么也没有|种子还是没有发芽]。{A}很<sad>，对{B}说：“[种子是不是死了|它是不是睡着了|它是不是不会长出来了]？”{A.he}真想[
把种子挖出来看看|不管它了|把花盆扔掉]。[//|]“[别挖|等一等|别放弃]，”{B}说，“[种子需要时间|它正在土里用力呢|好事要慢慢等
]。”于是，{A}[接着等|继续浇水|又耐心地等]。{B}[也来帮忙|帮着拔草|提来了一桶水]。[后来，一连几天都是晴天。|夜里，下了一
场小雨。]一天早上，{A}看见土里[冒出了一个小芽|长出了两片嫩叶]。“{B}，[快来看|它活了]！”{A.he}喊道。小苗[一天天长大|越长
越高|长得很快]。到了[六月|七月|八月|九月]，它{p.b}，{p.c}。[//|]{A}[请{B}一起来看|拉着{D}来看|围着它又唱又跳]。{D}说：“
[你真有耐心|这是你用汗水换来的|你等到了]！”[{A}留下几粒种子，明年再种。|{A}送给{B}一粒种子。|{A}明白了：耐心等待，才有
收获。]<end>
?谁给了{A}种子？ => {D}
?{A}种的是什么？ => {p}
= cook any
@s 苹果派;糖;揉好了面 / 蔬菜汤;盐;切好了菜 / 蛋糕;鸡蛋;筛好了面粉 / 炒饭;鸡蛋;煮好了米饭 / 饺子;面粉;剁好了肉 / 面条;酱
  油;烧好了水
<intro><when>，{A}想给[{D}|{C}][做|亲手做]{s}。{A.he}[洗干净手|穿上围裙|看了两遍菜谱]，{s.c}，[打开柜子一看|再往架子上
一找]，[咦|啊]，没有{s.b}了！“[这可怎么办？|没有{s.b}，就做不成了！]”{A}说。[商店太远了。|商店已经关门了。|这时候去买已
经来不及了。][//|]{A}[跑到|来到]{B}家，敲了敲门，问：“{B}，你家有{s.b}吗？”“[有啊|当然有|有，你等一下]！”{B}给了{A}[一
些|一点儿]{s.b}，又问：“[我可以帮忙吗|我们一起做，好不好]？”“[太好了|好啊|当然可以]！”{A}说。厨房里，{A}[搅了又搅|看着
火|忙着做菜]，{B}[洗碗|摆筷子|把{s.b}放进去]。[面粉弄得到处都是，{they}哈哈大笑。|{they}忙得满头大汗。|{A}差一点儿烫到
手。|厨房里热气腾腾。]<soon>，{s}做好了，[香极了|闻起来真香|香味飘满了屋子]。[//|]{they}把{s}端到桌上。{D}尝了一口，[笑
着说|点点头说|眯起眼睛说]：“[真好吃|味道好极了|我还要再吃一点]！”{A}说：“是{B}帮了我。”{B}[不好意思地笑了|脸红了|心里甜
甜的]。[最后，{they}一起洗了盘子。|不一会儿，盘子就空了。|]<end>
?谁给了{A}{s.b}？ => {B}
?{A}想做什么？ => {s}
= broken any
@r 胶水;把碎片粘好 / 针和线;把它缝好 / 颜料和画笔;把它画得像新的一样 / 胶带;把裂开的地方贴好
<intro>{B}有{x.one}，[是新买的|很漂亮|是{col}的]。{B}把{x}借给{A}[玩一天|用一会儿]，说：“[请小心一点|要好好爱护它|这是
我最喜欢的]。”{A}[答应了|点点头|一开始很小心]。可是<when>，{A}[跑得太快|被椅子绊了一下|没有看路]，{x}[掉到地上|撞到墙上
|从楼梯上滚下去]，坏了！{A}[吓坏了|心里怦怦直跳|急得出了一身汗]。{A.he}想：“[{B}一定会生气的。|{B}会不会不理我了？]”[//
|][{A}把{x}藏到床底下。|{A}把{x}塞进一个黑盒子里。|{A}想说是小猫弄坏的。|{A}想偷偷跑掉。]可是{A.he}[吃不下饭|睡不着觉|
没有心思玩]。[说谎就像背着一块大石头。|这个秘密太沉重了。]<soon>，{A}[去找{D}|把事情告诉了{D}]。{D}说：“[做错了事，要勇
敢地承认|说实话，才是好孩子|去向{B}道歉吧]。”{A}就拿着{x}去找{B}，说：“我把你的{x}弄坏了，对不起。”[//|]{B}[有点<sad>|
愣了一下]，然后说：“[谢谢你告诉我|你说了实话，我很高兴|你能承认，真勇敢]。”{D}拿来了{r}。{A}{r.b}，{B}[在旁边帮忙|扶着
{x}]。[虽然不像新的，但是还能用。|现在它比以前还好看。|过了一个小时，终于修好了。]“[我原谅你了|我们还是好朋友|来，我们
一起玩吧]！”{B}说。[{A}觉得心里轻松多了。|诚实让{they}的友谊更深了。|以后，{A}做事更小心了。]<end>
?谁弄坏了{x}？ => {A}
?{x}是谁的？ => {B}
?{D}拿来了什么？ => {r}
= birthday any
@g 一串贝壳项链;海边 / 一幅画;桌子前 / 一只小木鸟;院子里 / 一个花环;花园里 / 一首歌;窗前 / 一盏纸灯笼;地板上 / 一张贺卡
  ;灯下
{B}的生日快到了。{A}想送给{B}[一件礼物|一件特别的东西]。[{A.he}打开存钱罐|{A.he}摸了摸口袋]，里面只有{m.d}元钱，可是店
里的{x}要{m.a}元。{A}[坐在台阶上发愁|不知道怎么办才好|<sad>极了]。[//|]{D}问：“{A}，[你怎么了|你怎么不说话]？”“我买不起
礼物。”{A}说。“[自己动手做的礼物最好|礼物不一定要花钱|最重要的是心意]。”{D}说。{A}有了一个好主意。{A.he}坐在{g.b}，做了
{g}。[{A.he}做了整整一天。|这可不容易。|{A.he}重新做了三次才成功。]{C}[也来帮忙|也出了主意|拿来了{col}的彩纸]。[//|]
{day}，生日会开始了。[门上挂着气球。|蛋糕上插着{age}根蜡烛。|大家一起唱生日歌。|屋子里坐满了朋友。]{C}送给{B}{y.one}。
{A}送给{B}的是{g}。{A}[有点紧张|心里怦怦跳|悄悄看着{B}]。{B}[睁大了眼睛|愣住了|看了又看]，说：“[这是你自己做的吗|是你为
我做的吗]？”“是的。”{A}说。“[这是最好的礼物|我太喜欢了|我会永远留着它]！”{B}[笑着说|激动地说]。[大家一起吃蛋糕，又唱又
跳。|大家玩到很晚才回家。|{A}比谁都高兴。]<end>
?谁送给{B}{y.one}？ => {C}
?{A}送给{B}什么？ => {g}
= night any
@s 咚咚咚;窗外的树枝;是风在吹它 / 沙沙沙;一只小老鼠;它想找点吃的 / 咕咕咕;树上的猫头鹰;它在对着月亮唱歌 / 滴答，滴答;水
  龙头;有人忘了关好它 / 砰砰砰;院子的门;门没有关好 / 喵喵喵;一只迷路的小猫;它又冷又饿
<intro>[一天夜里|{day}晚上|一个漆黑的夜晚|深夜里]，{A}[怎么也睡不着|忽然醒了]。[月亮躲在云后面。|屋子里静悄悄的。|大家
都睡了。|外面刮着风。]忽然，{A}听见一阵声音：“{s}！”{A}[用被子蒙住头|坐了起来|抱紧了枕头]，[小声说|发着抖说]：“[是谁在
那儿|是妖怪吗|那是什么]？”声音又来了：“{s}！”{A}的心[跳得飞快|怦怦直跳]。[//|]{A}叫醒了{B}。{B}[睡在旁边的床上|今晚在这
里过夜]。“[你听见了吗？|你听！]”{A}说。{B}听了听，说：“[我也有点怕|真奇怪]，不过[我们去看看吧|两个人一起就不怕了]。”{A}
拿着[一盏灯|一支蜡烛|手电筒]，{B}拿着[一把扫帚|一个枕头|一把长勺子]，{they}[轻手轻脚地走|手拉着手走|慢慢地走下楼]。[地
板凉凉的。|墙上的影子又长又大。|{they}一步一步地走近了。]{A}[打开门|举起灯|深深地吸了一口气]，一看，原来是{s.b}！{s.c}
。[//|]{A}和{B}[哈哈大笑起来|你看看我，我看看你，都笑了]。“[根本没有妖怪|我们自己吓自己|原来没什么可怕的]！”{B}说。[
{they}把事情弄好，又回去睡觉了。|{they}喝了点热牛奶，又上床了。|第二天早上，{they}把这件事告诉了{D}。][勇敢地去看一看，
害怕就会变小。|从那以后，{A}不怕黑了。|{A}闭上眼睛，一觉睡到天亮。]
?是什么在响？ => {s.b}
?谁叫醒了{B}？ => {A}
= market any
<intro><when>，{D}给了{A}一个篮子和{n.pay}元钱，说：“请你去买一些{f}和{g}。[路上小心|别忘了买什么|天黑以前回来]。”{A}[
往市场跑去|一边走一边念：“{f}，{g}”|高高兴兴地出了门]。[市场里人山人海。|市场里真热闹。|市场里有好多好东西。]{A}看见[耍
猴的人|一家玩具店|一面大鼓|卖糖人的老爷爷]，[看得入了迷|差一点忘了要买什么]。[//|]这时，{A}遇见了{B}。“[你要买什么|你在
找什么]？”{B}问。“{f}和{g}。”{A}说。“[那边的最新鲜|跟我来|我知道哪一家好]。”{B}说。{f}一共{n.a}元，{g}一共{n.b}元，合起
来是{n.s}元。{A}给了[卖菜的阿姨|老板|老爷爷]{n.pay}元，找回{n.back}元。[//|][回家的路上，{A}数了数钱，[发现|咦，]多了
{extra}元！{A}[本来可以留下|本来可以买糖吃]，可是{A.he}[马上跑回去|转身就往回走]，说：“您多找给我钱了。”“[真是诚实的孩
子|你真诚实]！”卖东西的人说完，送给{A}[一朵花|一个李子|一颗糖]。|回家的路上，[篮子太重了，{A}提不动|篮子坏了]。{B}帮{A}
一起[抬|提]回家。“[两个人一起就不重了|人多力量大]。”{B}说。{A}分给{B}[一{f.m}{f}|一{g.m}{g}]，表示感谢。]{D}[看了看篮子
|在门口等着|数了数]，说：“{A}[真能干|长大了|一样也没有忘]！”<end>
?{f}和{g}一共多少元？ => {n.s}
?找回多少元？ => {n.back}
= learn human
@k 游泳;在游泳池边;呛了一口水;游到了对岸 / 骑自行车;在公园里;摔在草地上;绕着公园骑了一圈 / 滑冰;在冰场上;一屁股坐在冰上
  ;在冰上滑了一个大圈 / 吹笛子;在花园里;吹出了难听的声音;吹完了一首曲子 / 跳绳;在操场上;被绳子绊住了;连着跳了一百下 /
  爬绳;在学校里;滑了下来;爬到了最高处
<intro>{B}会{k}，{A}却不会。[{A}天天看着{B}，很羡慕|{A}心里有点失落|{A}也想像{B}一样]。“[太难了，我学不会|我太小了|我一
定学不会]。”{A}说。“[谁也不是一天就学会的|我以前也不会|慢慢来]，”{B}说，“[我来教你吧|你跟我学|试试看吧]。”[//|]<when>，
{they}{k.b}见面了。{A}试了一次，{k.c}；再试一次，又{k.c}。[有几个孩子笑了。|{A}的脸红了。|{A}快要哭了。]“我不想学了。”
{A}说。{B}[没有笑|摇摇头|拉着{A}的手]，说：“[再试一次|看着前面|别怕失败]。”[{D}在旁边拍手。|{C}喊：“加油！”|{C}教了{A}
一个小办法。]{A}[深吸一口气|咬咬牙|在心里数了三下]，又试了一次。这一次[好了一点|好多了]。[//|]{day}，{A}在练习；第二天
，第三天，{A}还在练习。[一天比一天容易了。|虽然手脚都疼，但是{A.he}没有停。|{B}每天都来帮忙。][两个星期以后|到了月底|一
天早上]，{A}{k.d}！“[我会了|我成功了|快看我]！”{A}大喊。{B}[使劲鼓掌|高兴得跳起来]，说：“[我就知道你行|你没有放弃|你真
努力]！”[现在，{A}也教别的小朋友{k}。|现在，{they}每个星期都一起{k}。|“谢谢你教我。”{A}说。]<end>
?{A}学会了什么？ => {k}
?谁教{A}？ => {B}
= hurt any
@b 小鸟;翅膀受了伤;一些谷子;飞上了蓝天;只 / 刺猬;脚受了伤;一些苹果;走进了树丛;只 / 小猫;腿受了伤;一条小鱼;沿着墙跑远了;
  只 / 蝴蝶;翅膀湿了;一滴蜂蜜;飞过了花丛;只 / 乌龟;壳卡在石头缝里，受了伤;一些菜叶;慢慢爬进了池塘;只
<intro><when>，{A}[在回家的路上|正在外面玩|正在采花]，忽然听见[轻轻的|奇怪的|弱弱的]声音。[树丛后面|篱笆下面|路边]有一
只{b}，{b.b}，[走不了了|样子很可怜]。“[可怜的小东西|别怕|我来帮你]。”{A}说。{A}[轻轻地把它捧起来|把它放在帽子里|用盒子
把它带回家]。[//|]{A}不知道该怎么办，就去找{B}。{B}[仔细地看了看|读过关于动物的书|也想帮忙]，说：“它要[休息|喝水|住在暖
和的地方]，还要吃{b.c}。”{B}拿来了{b.c}，{A}用[干草|旧围巾|棉花]做了一张软软的小床。{b}[吃了一点点|用亮亮的眼睛看着
{they}|一开始吓得发抖]。[每天早上，{A}给它换水。|{A}和{B}轮流照顾它。|半夜里，{A}还起来看它。]{D}说：“[你们真像小医生|
你们做得很好|对它要温柔一点]。”[//|]过了{days}天，{b}[好了|又有力气了|又活泼起来了]。“我们可以留下它吗？”{A}问。“[它想
要自由|它的家在外面|它的妈妈在等它]。”{B}说。{A}有点舍不得，可是{A.he}知道{B}说得对。{they}把它带到外面，{b}{b.d}。[它
还回头看了一眼。|“再见，小朋友！”{A}喊道。|{A}不停地挥手。][一个星期以后，它又来看{A}了。|有时候，{A}还能在花园里看见它
。|帮助它，再让它走，这也是爱。]<end>
?谁发现了{b}？ => {A}
?谁拿来了{b.c}？ => {B}
= newfriend human
[{day}|{day}早上|一天早上|有一天]，班里来了一个新同学，名叫{B}。{B}[是从很远的城市来的|刚刚搬到这里|谁也不认识]，[总是
低着头|很少说话|一个人坐在后面]。吃午饭的时候，{B}[坐在窗边|站在树下|自己一个人吃]。{A}[远远地看见了|正在和{C}玩|放下了
筷子]，问{C}：“[{B}怎么不和我们玩|{B}是不是很孤单]？”{C}说：“[可能是害羞吧|我也不知道|我们去问问吧]。”[//|]{A}想起自己
刚来的那一天，[也没有人和{A.he}说话|心里很害怕|觉得自己很小很小]。于是，{A}拿着{x}走过去，说：“你好，我叫{A}。[你想一起
玩吗|你想看看我的{x}吗|我可以坐在这里吗]？”{B}[抬起头|有点吃惊|轻轻地笑了]，说：“[好啊|我很想|可以]。”{C}也来了，还带来
了[一些{f}|一个球|一根绳子]。[{all3}一直玩到上课铃响。|{all3}说起动物和星星，说个不停。|{all3}发现大家都爱吃{f}。][//|]
放学以后，{B}说：“[今天早上我很害怕|我以为没有人理我]，现在我很<glad>。”第二天，{B}送给{A}{y.one}，说：“[这是我做的|这
是送给我第一个朋友的]。”[从此，三个人天天一起回家。|不久，{B}就认识了全班同学。|{A}明白了：一句温暖的话，能让人高兴一整
天。]<end>
?谁是新同学？ => {B}
?谁送给{A}{y.one}？ => {B}
= stuck any
@v 皮球 / 帽子 / 纸飞机 / 风筝 / 围巾 / 飞盘
@t 一根长棍子;棍子太短了 / 一根绳子;绳子够不着 / 一架梯子;梯子是坏的 / 一块小石子;没有打中
@h 一只长颈鹿;伸长脖子把它取了下来 / 一只猫头鹰;飞上去把它推了下来 / 一只乌鸦;用嘴把它拉了出来 / 一只机灵的松鼠;三下两
  下爬上了树，把它摇了下来
<intro><when>，{A}和{B}一起玩{A}的{v}。[风很大。|{they}跑上山坡，又跑下山坡。|{they}又笑又叫。]忽然，{B}[扔得太高了|用
力太大了]，{v}卡在了树上！“[哎呀，我的{v}|糟糕，拿不下来了]！”{A}叫道。“对不起，”{B}说，“[我不是故意的|我来想办法|我去
拿下来]。”{A}先跳起来拿，可是[树枝太高了|够不着]。{B}拿来{t}，可是{t.b}。[{they}使劲摇树，只掉下来几片叶子。|{A}站到{B}
的背上，结果两个都摔倒了。|{they}对着{v}大喊，它当然不会动。][//|]{A}[坐在地上，很<sad>|想要放弃|叹了一口气]。就在这时
，{h}来了，问：“[你们在看什么|怎么了|要我帮忙吗]？”{A}把事情说了一遍。“[这个简单|没问题|看我的]！”它说完，就{h.b}。{v}
正好落在{A}的手里！[//|]“<thanks>！”{A}说。“[我们怎么谢你呢|你想要什么]？”{B}问。它说：“[让我和你们一起玩吧|有一{f.m}
{f}就好了|只要你们也帮助别人就行]。”{B}就送给它一{f.m}{f}。[{they}一起玩了一下午，离大树远远的。|后来，{B}扔得小心多了
。|一个办法不行，就请别人帮忙。]<away>
?谁把{v}扔得太高？ => {B}
?什么卡在了树上？ => {v}
= cake any
@w 嘴边的碎屑;碎屑 / 手上的糖;糖 / 下巴上的果酱;果酱 / 袖子上的奶油;奶油
<intro>{D}为[聚会|野餐|节日]做了{n.s}个[小蛋糕|蜂蜜蛋糕]，[放在桌子上|放在窗边|摆在蓝盘子里]，说：“[这是明天吃的|今天谁
也不能吃|别动它们]。”可是，{A}[闻到了香味|走进了厨房|从门口经过]，蛋糕看起来[又软又甜|真好吃]！{A}想：“[只吃一个没关系|
尝一小口吧|谁也不会看见]。”{A.he}吃了一个又一个，一共吃了{n.a}个，只剩下{n.b}个。[//|]{D}回来数了数蛋糕，问：“[谁吃了蛋
糕|还有{n.a}个蛋糕到哪里去了]？”{B}说：“不是我。”{A}[看着地板|不说话|红了脸]，然后说：“[可能是老鼠吃的|也许是风吹走的]
。”{B}看见{A}{w}，[笑了|伸手一指]，问：“那{w.b}是从哪里来的呢？”{A}[哭了|再也说不出谎话了|低下了头]，说：“是我吃的，对
不起。”[//|]{D}[没有骂{A.he}|摸摸{A.he}的头]，说：“[说谎会让小错变成大错|谁都会犯错，但是要诚实]。[我们再做一些吧|来，
帮我再做{n.a}个]。”{A}和{B}忙了一个晚上。{A}[打鸡蛋|搅面糊]，{B}[看着烤箱|洗盘子]。最后，又有{n.s}个蛋糕了。[第二天，大
家都说好吃。|{A}一个也没有偷吃。|{D}抱了抱{they}。]<end>
?谁吃了蛋糕？ => {A}
?还剩几个蛋糕？ => {n.b}
= sick any
<intro>[每天早上|每天]，{A}都在[路口|桥边|大树下]等{B}。可是<when>，{B}没有来。{A}[等了又等|看看东边，又看看西边|喊了几
声]，心想：“[{B}出了什么事|{B}到哪里去了]？”{C}走过来说：“{B}病了，[感冒了|发烧了|一直咳嗽|嗓子很疼]，要躺在床上休息。”
{A}很<sad>，说：“[我们去看看{B}吧|我们让{B}高兴一下吧]。”[//|]{A}做了[热汤|蜂蜜茶|一块蛋糕]，{C}[摘了一束花|带了{n.a}
{f.m}{f}|拿了一袋{f}]。{A}还带上了自己的{x}，因为{B}很喜欢它。[路很远，天又冷。|风很大，可是两个人没有停。|两个人冒着雨
往前走。]{B}躺在床上，[鼻子红红的|眼睛没有精神|头很烫]。看见朋友来了，{B}[坐了起来|笑了|忘了难受]，说：“[你们这么远还来
看我|我一个人好孤单啊]！”{C}[打开窗户|讲了一个笑话|念了一个故事]，{A}把{x}[送到{B}手里|放在床上]，说：“[先借给你玩|让它
陪着你]，等你好了再还给我。”[//|]{D}说：“[好好休息，多喝水|朋友就是最好的药]。”过了{days}天，{B}的病好了。{B}[跑到{A}家
|敲开{A}的门]，把{x}还给{A}，说：“<thanks>，[你们来看我，比药还管用|有朋友真好]。”[然后，{they}一起跑出去玩了。|{they}
又在老地方见面了。]<end>
?谁生病了？ => {B}
?{A}给{B}带去了什么？ => {x}
"""

# ---------------------------------------------------------------------------------------------------------------------
# Descriptions.

DESCRIPTIONS_EN = """
= animal human
@a cat; cats; soft fur and sharp claws; fish and meat; in houses with people; climb trees; A cat likes to sleep in the
  sun / dog; dogs; a good nose and a tail that it can wag; meat and bones; in homes with people; guard the house; A
  baby dog is a puppy / cow; cows; a big body and four strong legs; grass; on farms; give us milk; A baby cow is a calf
  / rabbit; rabbits; long ears and a short tail; grass and carrots; in holes under the ground; jump far; A rabbit has
  strong back legs / elephant; elephants; a long nose and big ears; leaves and grass; in hot lands; carry heavy logs;
  It drinks with the help of its nose / panda; pandas; black and white fur; bamboo; in the mountains of China; climb
  trees; A panda eats for many hours every day / bee; bees; two pairs of wings; the sweet juice of flowers; in a hive;
  make honey; Bees work together / ant; ants; six legs; seeds and crumbs; in nests under the ground; carry heavy
  things; Ants work together / duck; ducks; wide feet and smooth feathers; grass and worms; near ponds and rivers; swim
  well; A baby duck is a duckling / owl; owls; big eyes and soft feathers; mice; in trees; see well at night; Most owls
  sleep in the day / monkey; monkeys; long arms and quick hands; fruit and leaves; in warm forests; swing from branch
  to branch; Monkeys live in groups / bear; bears; thick fur and strong arms; fish and berries; in forests and
  mountains; swim and climb; Many bears sleep through the winter / giraffe; giraffes; a very long neck and long legs;
  leaves from tall trees; in hot lands; run fast; It is the tallest animal on land / penguin; penguins; black and white
  feathers; fish; by cold seas; swim very well; A penguin is a bird, but it cannot fly / frog; frogs; smooth wet skin;
  insects; near ponds; jump far; A baby frog lives in water and has a tail / horse; horses; long legs and a long neck;
  grass and hay; on farms; run fast; People can ride on a horse / hen; hens; feathers and a small beak; corn and worms;
  on farms; lay eggs; A baby hen is a chick / sheep; sheep; thick wool; grass; on farms and hills; give us wool; A baby
  sheep is a lamb / turtle; turtles; a hard shell; plants and small fish; in water and on land; hide in their shells;
  Turtles can live for a long time / whale; whales; a huge smooth body; small sea animals; in the sea; dive deep; It
  must come up to breathe air / butterfly; butterflies; four thin wings; the sweet juice of flowers; in gardens and
  fields; fly from flower to flower; It comes from a caterpillar / snake; snakes; a long body and no legs; mice and
  frogs; in grass and forests; move without legs; Some snakes can swim / spider; spiders; eight legs; insects; in webs;
  make strong webs; A spider is not an insect / camel; camels; long legs and a hump; dry plants; in the desert; walk
  for days without water; People call it the ship of the desert
[This is a {a}.|Look at the {a}.|Let us talk about the {a}.|What do you know about {a.b}?|{A} likes {a.b}.|Today {A}
saw a {a} in a [book|film].| {A} drew a {a}.] (([A {a} has {a.c}.|{a.b} have {a.c}.] ~ [{a.b} eat {a.d}.|The food of
{a.b} is {a.d}.|What do {a.b} eat? They eat {a.d}.] ~ [{a.b} live {a.e}.|You can find {a.b} {a.e}.|Where do {a.b} live?
They live {a.e}.] ~ [{a.b} can {a.f}.|What can {a.b} do? They can {a.f}.] ~ {a.g}.)) [{A} would like to see a real
one.|{A} wants to learn more about {a.b}.|I think {a.b} are wonderful.|]
= pet human
@a cat; fish / dog; bones / rabbit; carrots / duck; bread / hen; corn / hamster; seeds / parrot; nuts / turtle; leaves
  / pony; hay
@n Snow / Star / Coco / Lucky / Button / Pepper / Sunny / Bean / Tiger / Cloud
{A} has a [black|white|brown|grey] {a}. [Its name is {n}|{A} calls it {n}]. ((It is {days} years old. ~ {n} likes to
eat {a.b}. ~ {n} sleeps [in a basket|under the table|on an old scarf|next to the [stove|door|bed]]. ~ [Every
morning|After school|In the evening], {A} [feeds {n}|plays with {n}|gives {n} fresh water]. ~ {n} has a {col2}
[ball|bowl|blanket|ribbon]. ~ {B} also likes {n} and [comes to see it on {day}|brings it a {f} now and then|wants a {a}
too]. ~ {n} is [quiet|lively|clever|gentle|lazy|funny] and [a little shy|very friendly|always hungry|never angry].))
[{A} and {n} are best friends.|{A} takes good care of {n}.|{A} loves {n} very much.]
= season human
@s spring; warm; flowers open and trees get new leaves; plant seeds; March, April and May; fly kites / summer; hot; the
  sun shines for many hours; swim and eat cold melon; June, July and August; catch fireflies / autumn; cool; leaves
  turn yellow and fall; pick apples and pumpkins; September, October and November; walk in the fallen leaves / winter;
  cold; snow may fall and ponds may freeze; wear thick coats; December, January and February; make a snowman
[{s} is a season.|There are four seasons, and one of them is {s}.|{A} likes {s}.|{A} asked, "What is {s} like?" {D}
said:] (([In {s}, the weather is {s.b}.|{s} is {s.b}.] ~ In {s}, {s.c}. ~ [People {s.d}.|It is time to {s.d}.] ~ In
many places, the months of {s} are {s.e}. ~ [Children like to {s.f}.|{A} and {B} like to {s.f} in {s}.] ~ [In {s}, {A}
wears a {col} [hat|coat|shirt].|{A} often goes out with {B}.])) [{s} is beautiful.|Which season do you like best?|{B}
likes it too.|]
= job human
@j doctor; a hospital; helps sick people; a clean white coat / teacher; a school; helps children to learn; books and
  chalk / farmer; a farm; grows rice and vegetables; a strong tractor / cook; a kitchen; makes food; pots and pans /
  baker; a bakery; bakes bread and cakes; a hot oven / driver; a bus; takes people from place to place; a big wheel /
  firefighter; a fire station; puts out fires; a long ladder and water / nurse; a hospital; takes care of sick people;
  a kind smile / painter; a studio; paints pictures; brushes and paint / pilot; a plane; flies people to far places;
  many small buttons / dentist; a clinic; looks after teeth; a small mirror / postman; a post office; brings letters; a
  big bag / carpenter; a workshop; makes tables and chairs; a saw and a hammer / fisherman; a boat; catches fish; a net
  / tailor; a shop; makes clothes; a needle and thread
[{A}'s [mother|father|uncle|aunt] is a {j}.|A {j} lives next to {A}.|{A} wants to be a {j} one day.|Today {A} met a
{j}.] ((A {j} {j.c}. ~ [A {j} works in {j.b}.|Where does a {j} work? In {j.b}.] ~ A {j} uses {j.d}. ~ The work starts
early, at {dawn} o'clock. ~ [It is hard work, but it is useful.| The work is not easy.|A {j} must be careful.] ~ [{A}
thinks this job is very interesting.|{B} thinks so too.|{B} wants to be a {j} as well.])) [Every job is important.|We
say thank you to the {j}.|{A} is proud.|]
= person human
{A} is {age} years old. (([{A.He} lives|{A} lives] {home}. ~ {A.His} favourite colour is {colb}. ~ {A} likes {f.s}, but
{A.he} does not like {g.s}. ~ {A} has a {col} {x} and a {col2} {y}. ~ {A.His} best friend is {B}. ~ On {day}, {A} [goes
swimming|visits {D}|plays football|draws pictures|rides a bicycle|helps in the garden|goes to the library]. ~ {A.His}
birthday is in {month}. ~ {A} has [a brother|a sister|two brothers|two sisters|a baby sister] and [a cat|a dog|no
pet|three fish]. ~ {A} is good at [singing|running|drawing|reading|cooking|counting] and wants to learn to
[dance|swim|play the piano|ride a horse].)) [{A} is a <adj> {A.kid}.|Everyone likes {A}.|{A} is always <glad>.|]
= room human
@r {A}'s room / the kitchen / the classroom / the garden shed / the shop / the living room / {B}'s house
[This is a picture of {r}.|Let us look into {r}.|Come into {r}.|{A} is in {r} now.] ((There are {n.a} {x.s} [on the
table|on the shelf|in a box]. ~ There is a {col} {y} [near the door|on the chair|by the window]. ~ [On the wall|In the
corner] there is a [clock|map|picture of a {u}|mirror|calendar]. ~ There are {n.b} {f.s} in a {col2} bowl. ~ The floor
is [clean|made of wood|dry]. ~ A {u} is [looking in at the window|asleep under the table|sitting by the door]. ~ The
window is [open|closed|wide and bright]. ~ It smells of [flowers|fresh bread|soap|paint|wood].)) [It is a nice
place.|{A} likes to be here.|{B} comes here every {day}.|How many {x.s} do you see?|]
= food human
@d noodle soup; noodles, water and vegetables; hot; with chopsticks or a spoon / fruit salad; apples, bananas and
  oranges; sweet; with a fork / bread; flour, water and salt; soft; with butter / an omelette; eggs and a little milk;
  soft; with a fork / dumplings; flour, meat and cabbage; hot; with chopsticks / porridge; rice and water; warm; with a
  spoon / a sandwich; bread, cheese and tomato; fresh; with the hands / pancakes; flour, eggs and milk; sweet; with
  honey / tomato soup; tomatoes, onions and salt; hot; with a spoon / lemonade; lemons, water and sugar; cold; through
  a straw
[{A} likes {d}.|Today {A} makes {d}.|{D} often makes {d}.|Do you know {d}?] ((You need {d.b}. ~ It tastes best when it
is {d.c}. ~ [People often have it {d.d}.|{A} has it {d.d}.] ~ [First, {A} washes {A.his} hands.|Always wash your hands
first.] ~ [It takes about {tens} minutes.|After {tens} minutes, it is ready.] ~ {B} likes it too, but {B.he} likes
{f.s} more. ~ [{A} ate it on {day} and again today.|On {day}, {A} shared it with {B}.])) [It is good for you.|It is
easy to make.|What do you like to eat?|Enjoy your meal!]
= weather human
@w sunny; The sun is bright; takes a hat / rainy; Water is falling from the clouds; takes an umbrella / windy; The
  trees are moving; puts on a coat / snowy; Everything is white; puts on warm boots / foggy; It is hard to see far;
  takes a lamp / cloudy; The sun is behind the clouds; puts on a coat
Today is {day}, and it is {w}. (({w.b}. ~ {A} {w.c} and goes out. ~ It is {hour} o'clock in the morning. ~ {B} stays at
home and [reads a book|plays with a {x}|helps {D}]. ~ A [bird|cat|squirrel] sits [under a roof|on a wall|in a tree]. ~
[Tomorrow will be different.|Yesterday was different.] ~ In the [morning|afternoon] {A} and {B} [walk to the
bridge|look out of the window|count the clouds|go to the shop].)) [{A} likes this weather.|{A} does not like this
weather.|{B} says, "What a day!"|The day goes by fast.]
= thing human
@o umbrella; It keeps us dry in the rain; cloth and metal / clock; It shows the time; metal and glass / lamp; It gives
  light at night; glass and metal / chair; We sit on it; wood / knife; We cut bread with it; metal / spoon; We eat soup
  with it; metal / window; It lets in light and air; glass and wood / pencil; We write and draw with it; wood / book;
  We read it and learn from it; paper / key; It opens a door; metal / bed; We sleep in it; wood and cloth / cup; We
  drink from it; clay / broom; We clean the floor with it; straw and wood / coat; It keeps us warm; cloth or wool /
  bridge; It takes us over a river; stone or wood / ladder; It helps us to reach high places; wood or metal / bell; It
  makes a clear sound; metal / kite; It flies in the wind; paper and thin wood
[What is this? It is a {o}.|This is a {o}.|Look, here is a {o}.|{A} found a {o}.|{A} drew a {o}.] (({o.b}. ~ It is
often made of {o.c}. ~ {A} has one, and it is {col}. ~ {B} got a new one on {day}. It cost {n.a} coins. ~ It is useful
[at home|every day|for everyone]. ~ [{A} keeps it near the door.|{B} put it next to the {x}. |{D} has had it for {days}
years.])) [Do you have one too?|Can you find one at home?|Use it with care.|]
"""

DIALOGUES_EN = """
= plan any
@p the park; play ball / the river; look for stones / the library; read / the zoo; see the lions / the zoo; see the
  monkeys / the zoo; see the elephants / the hill; fly a kite / the beach; look for shells / the farm; feed the hens /
  the farm; feed the goats / the museum; look at old ships
{A}: [Hello|Hi|Good morning], {B}! What [are you going to do|will you do] on {day}?//{B}: [I do not know yet|I have no
plan|Nothing special]. [Do you have an idea?|And you?|Why do you ask?]//{A}: [Let us go to {p}|We could go to {p}|I
want to go to {p}]. We can {p.b} there.//{B}: [That sounds great|What a good idea|I would love to]! [How do we get
there|Is it far]?//{A}: [We can walk. It takes {tens} minutes.|We can take bus number {n.a}.|{D} can take us by
car.]//{B}: [What shall I bring|Should I bring anything]?//{A}: Please bring [some {f.s}|your {x}|a bottle of water|a
warm coat]. I will bring [the {y}|some {g.s}].//{B}: [When do we meet|What time shall we meet]?//{A}: At {hour}
o'clock[, in front of my house|, by the bridge|].//{B}: [Great. See you then|Good. I will be there|See you on {day}]!
?Where do they want to go? => to {p}
?When do they meet? => at {hour} o'clock
= shop human
Seller: [Good morning|Hello|Good afternoon]! [What would you like|Can I help you]?//{A}: [Hello.|Good day.] How much is
the {col} {x}?//Seller: [It is|It costs] {n.a} dollars.//{A}: And [how much is the {col2} {y}|what does the {y}
cost]?//Seller: The {y} [is|costs] {n.b} dollars.//{A}: [I will take both|I would like the {x} and the {y}|Then I want
both], please. [How much is that|What do I have to pay]?//Seller: {n.a} plus {n.b} is {n.s}. That is {n.s} dollars,
please.//{A}: Here [are|you go, these are] {n.pay} dollars.//Seller: {n.pay} minus {n.s} is {n.back}. Here [are|is your
change:] {n.back} dollars[ back|].//{A}: [Thank you. Goodbye|Thanks a lot. Have a nice day]!//Seller: [Goodbye|See you
next time|Come again soon]!
?How much did {A} pay in all? => {n.s} dollars
?How much change did {A} get? => {n.back} dollars
= fruit human
{A}: [Excuse me|Hello], how much [is one {f}|does one {f} cost]?//Seller: One {f} [is|costs] {k.a} coins. [They are
very fresh today.|How many do you want? |They came this morning.]//{A}: I [would like|need|want] {k.b} {f.s},
please.//Seller: {k.b} times {k.a} is {k.p}. That makes {k.p} coins.//{A}: [Here you are| Here is the money].//Seller:
[Thank you. Do you need a bag|Thanks. Anything else]?//{A}: [No, thank you. I have a [basket|box|bag]|Not today, thank
you].//Seller: [Have a nice day|Goodbye|See you soon], {A}!
?How many {f.s} did {A} buy? => {k.b}
?How much did {A} pay? => {k.p} coins
= food any
{A}: [I am so hungry|I am hungry|It is almost noon], {B}. What [is for lunch|do we have to eat|shall we eat]?//{B}:
[There is|We have] [rice with vegetables|tomato soup|noodle soup|bread and cheese|fish and potatoes]. [Do you like
it?|Is that all right?]//{A}: [Yes, I like it very much|Yes, that sounds good|Well, I like {f.s} more].//{B}: [There
are also {n.a} {f.s} in the bowl|{D} also made a cake|I also have some {g.s}].//{A}: [Wonderful|How nice|Great]! Can I
[help you|set the table|wash the {g.s}]?//{B}: Yes, please. [Put two plates on the table|Bring the spoons|Fill the cups
with water].//{A}: [Done|It is ready|All right]. [It smells so good|Let us start]!//{B}: Enjoy your meal, {A}!//{A}:
Thank you, {B}. [You are a great cook|It tastes wonderful|I could eat this every day].
= weather any
@w sunny; take a hat / rainy; take an umbrella / windy; wear a scarf / snowy; wear warm boots / hot; drink a lot of
  water / cold; put on a thick coat
{A}: [How is the weather today|What is the weather like|Is it nice outside], {B}?//{B}: It is {w}. [You should
{w.b}|Please {w.b}|Do not forget to {w.b}].//{A}: [Thank you|Good to know|I will do that]. [And what about tomorrow|How
will it be tomorrow]?//{B}: [I heard that it will be|They say it will be] [warmer| colder|about the same|better]. Why
[do you ask|do you want to know]?//{A}: I want to [visit {C}|go to the market|wash my coat|play outside|plant some
[beans|flowers|trees]].//{B}: [Then go in the morning.|You can do that after lunch.|Can I come with you?]//{A}:
[Sure|Good idea|Yes]. [The morning is best|We can go together|I will call you].//{B}: [See you tomorrow|Fine|Good
luck]!
= way human
@p library; left; next to the bank / station; right; behind the park / school; left; near the church / hospital; right;
  beside the river / post office; left; across from the bakery / museum; right; near the old bridge / zoo; left; behind
  the hill / market; right; next to the tower
{A}: [Excuse me.|Hello, can you help me?] [Where is the {p}|How do I get to the {p}|Do you know the way to the
{p}]?//{B}: [Go straight|Walk straight on] and turn {p.b} at the [second street|traffic light|big tree|red
house].//{A}: [So I turn {p.b} there|And then]?//{B}: [Yes.|Then walk a little more.] The {p} is {p.c}.//{A}: Is it
[far from here|a long way]?//{B}: [No, it takes about {tens} minutes|It is {tens} minutes on foot|Not very far. You
need {tens} minutes].//{A}: [Thank you very much|Thank you for your help|That is very kind]!//{B}: [You are welcome|No
problem|Have a good day]!
?Where is the {p}? => {p.c}
?Where does {A} turn? => {p.b}
= school human
{A}: [What did you learn today|How was school today|What did you do at school], {B}?//{B}: We learned [to add|about
numbers|some sums]. Do you know what {n.a} plus {n.b} is?//{A}: [Let me think|Wait a moment|That is easy]. It is
{n.s}!//{B}: [Right|Correct|Yes, well done]! And {m.a} minus {m.b}?//{A}: [Hmm. {m.d}|That is {m.d}|It must be
{m.d}].//{B}: [Right again|You are quick|Very good]! [Now you ask me|Your turn].//{A}: What is {k.a} times {k.b}?//{B}:
{k.p}. [We learned that on {day}|My teacher taught me|I know that one]!//{A}: [We both did well|You are good at numbers
too]. [Let us play now.|Let us read a book.|Shall we go home?]//{B}: [Yes|All right|Good idea]!
= lend any
{A}: {B}, [may I borrow|can you lend me|could I use] your {x}?//{B}: [What do you need it for|Why do you need it|What
is wrong with yours]?//{A}: [Mine is broken|I left mine at home|I lost mine on {day}|I want to show it to {C}].//{B}:
[All right|Of course|Yes, you may]. [But please be careful|Please give it back on {day2}|Take good care of it].//{A}:
[I promise|I will|You can trust me]. [I can lend you my {y}.|Do you want my {y} for that time?]//{B}: [Thank you, that
is nice|Yes, please. I like your {y}|That is a fair trade].//{A}: Here is my {col} {y}.//{B}: And here is my {x}. [Have
fun|Enjoy it]!
?What does {A} borrow? => the {x}
?What does {B} get from {A}? => the {y}
= lost any
{A}: [Have you seen|Do you know where I put|Can you help me to find] my {x}[|, {B}]?//{B}: What [does it look
like|colour is it]?//{A}: It is {col}, and it is [quite new|rather old|very small|as big as a {f}].//{B}: [Did you
look|Have you looked] [under the bed|behind the door|in the kitchen|in your bag]?//{A}: Yes, [but it is not there|I
looked there twice].//{B}: [When did you use it last|Who used it last]?//{A}: [On {day}, with {C}|{C} used it this
morning|I had it yesterday].//{B}: Then [ask {C}|maybe {C} has it]. Wait! [Is that it on the chair?|What is that behind
the lamp?|I see something {col} under the table!]//{A}: [You found it|Yes, that is my {x}]! [Thank you|You are the
best], {B}!
?What did {A} look for? => the {x}
?Who saw it first? => {B}
= phone human
{A}: Hello, this is {A}. [Is that you|Can I speak to {B}|Who is there]?//{B}: [Hello {A}, it is {B}|This is {B}. Hi,
{A}]. [What is new|How are you]?//{A}: I am [fine|<glad>|a bit tired]. I have [good news|some news|a surprise]!//{B}:
[Tell me!|What is it?]//{A}: [We have a new {u}. It is [black|white|brown]|I got a {col} {x} from {D}|My birthday is on
{day}|{C} is coming on {day}].//{B}: [That is wonderful|How exciting|You are lucky]! [Can I come and see?|Tell me
more.]//{A}: [Yes|Sure|Of course], come [at {hour} o'clock|after school|on {day2}].//{B}: I will bring [some {f.s}|my
{y}|a small gift].//{A}: [Great|Lovely|Good]. [See you then|Until then]!//{B}: Bye, {A}!
= sick human
Doctor: [Good morning|Hello], {A}. [What is the matter|What is wrong|How do you feel]?//{A}: I [have a cough|have a
sore throat|have a headache|have a fever|feel cold and tired].//Doctor: When did it start?//{A}: [On {day}|Two days
ago|It started on {day}].//Doctor: [Open your mouth|Let me listen to your heart|Let me feel your head], please. [It is
only a cold|It is not serious|You do not have to worry].//{A}: [What should I do|Can I go to school]?//Doctor: [Stay in
bed|Rest at home] for {days} days, drink [warm water|tea] and eat [fruit|soup].//{A}: [Thank you, doctor|I will do
that. Thank you]. //Doctor: [Get well soon|See you next week], {A}!
= night human
{A}: [I cannot sleep, {D}.|I am not tired, {D}.|Can I stay up longer, {D}?]//{D}: [Why not, {A}?|What is wrong, {A}?|It
is already {hourn} o'clock, {A}.]//{A}: [I am thinking of tomorrow|It is so dark|I want to hear a story].//{D}: [All
right, a short one|Then listen]. Once there was a <adj> {u} that [lived on the moon|wanted to fly|had lost its
{x}|could not count].//{A}: [And then|What did it do|Was it sad]?//{D}: It [met a {v}|asked a {v} for help|walked for
{days} days], and [together they found the way|they shared {n.a} {f.s}|they became friends].//{A}: [That is a nice
story|I like that {u}|One more, please]!//{D}: [Tomorrow|Another time|On {day}]. Now close your eyes. Good night,
{A}.//{A}: Good night, {D}.
"""

DESCRIPTIONS_ZH = """
= animal human
@a 猫;只;柔软的毛和尖尖的爪子;鱼和肉;人的家里;爬树;猫喜欢晒太阳 / 狗;只;灵敏的鼻子和会摇的尾巴;肉和骨头;人的家里;看家;
  狗是人的好朋友 / 牛;头;壮壮的身体和四条腿;草;农场里;产奶;小牛跟着妈妈吃奶 / 兔子;只;长长的耳朵和短短的尾巴;草和胡萝卜
  ;地洞里;跳得很远;兔子的后腿很有力 / 大象;头;长长的鼻子和大大的耳朵;树叶和草;炎热的地方;搬运木头;大象用鼻子吸水 / 熊猫
  ;只;黑白相间的毛;竹子;中国的山林里;爬树;熊猫每天要吃很久 / 蜜蜂;只;两对翅膀;花蜜;蜂巢里;酿蜜;蜜蜂很勤劳 / 蚂蚁;只;六
  条腿;种子和碎屑;地下的巢里;搬运东西;蚂蚁总是一起干活 / 鸭子;只;扁扁的嘴和宽宽的脚掌;草和小虫;池塘和河边;游泳;小鸭子跟
  着妈妈学游泳 / 猫头鹰;只;又大又圆的眼睛;老鼠;树林里;在夜里看清东西;猫头鹰大多白天睡觉 / 猴子;只;长长的手臂和灵活的手;
  水果和树叶;温暖的森林里;在树枝间荡来荡去;猴子喜欢成群生活 / 熊;头;厚厚的毛和有力的手臂;鱼和果子;森林和山里;游泳和爬树
  ;很多熊冬天要睡觉 / 长颈鹿;只;很长的脖子和很长的腿;高处的树叶;炎热的草原上;跑得很快;它是陆地上最高的动物 / 企鹅;只;黑
  白两色的羽毛;鱼;寒冷的海边;游得很快;企鹅是鸟，可是不会飞 / 青蛙;只;光滑湿润的皮肤;害虫;池塘边;跳得很远;小蝌蚪长大就成
  了青蛙 / 马;匹;长长的腿和漂亮的鬃毛;草;农场和草原上;跑得很快;人可以骑马 / 母鸡;只;羽毛和尖尖的嘴;米和虫子;农场里;下蛋
  ;小鸡是从蛋里出来的 / 绵羊;只;厚厚的羊毛;草;山坡和农场里;给我们羊毛;羊毛可以做毛衣 / 乌龟;只;坚硬的壳;水草和小鱼;水里
  和陆地上;把头缩进壳里;乌龟可以活很久 / 鲸鱼;头;巨大光滑的身体;海里的小动物;大海里;潜到很深的地方;鲸鱼要到水面上来呼吸
  / 蝴蝶;只;薄薄的翅膀;花蜜;花园和田野里;在花丛中飞舞;毛毛虫长大会变成蝴蝶 / 蛇;条;长长的身体，没有脚;老鼠和青蛙;草丛和
  森林里;没有脚也能爬行;有些蛇会游泳 / 蜘蛛;只;八条腿;小虫;网上;织网;蜘蛛不是昆虫 / 骆驼;头;长长的腿和高高的驼峰;干草;
  沙漠里;很多天不喝水;人们叫它沙漠之舟
[这是一{a.b}{a}。|你看，一{a.b}{a}！|我们来认识一下{a}吧。|你了解{a}吗？|{A}喜欢{a}。|今天，{A}在书上看见了{a}。|{A}画
了一{a.b}{a}。](([{a}有{a.c}。|{a}长着{a.c}。] ~ [{a}吃{a.d}。|{a}爱吃{a.d}。|{a}吃什么？{a}吃{a.d}。] ~ [{a}生活在
{a.e}。|{a}住在哪里？它住在{a.e}。] ~[{a}能{a.f}。|{a}有什么本领？它能{a.f}。] ~ {a.g}。))[{A}真想看看真的{a}。|{A}还想
知道更多关于{a}的事。|{a}真有趣！|]
= pet human
@a 猫;只;鱼 / 狗;只;骨头 / 兔子;只;胡萝卜 / 鸭子;只;菜叶 / 母鸡;只;玉米 / 鹦鹉;只;瓜子 / 乌龟;只;小虾 / 小马;匹;青草 /
  仓鼠;只;豆子
@n 雪球 / 豆包 / 可乐 / 汤圆 / 毛豆 / 布丁 / 团子 / 小米 / 花生 / 来福
{A}养了一{a.b}[黑色|白色|棕色|灰色]的{a}，[名叫{n}|给它起名叫{n}]。(({n}今年{days}岁了。 ~ {n}最爱吃{a.c}。 ~ {n}睡在[
篮子里|桌子下面|旧围巾上|火炉旁边]。 ~ [每天早上|放学以后|傍晚]，{A}[给{n}喂食|和{n}一起玩|给{n}换水]。 ~ {n}有一个
{col2}的[小球|小碗|铃铛]。 ~ {B}也喜欢{n}，[{day}常来看它|有时带{f}来|也想养一{a.b}{a}]。 ~ {n}[很安静|很活泼|很聪明|很
温顺|有点懒|很有趣]，[有点怕生|特别亲人|总是吃不饱|从来不生气]。))[{A}和{n}是好朋友。|{A}把{n}照顾得很好。|{A}非常爱{n}
。]
= season human
@s 春天;暖和;花儿开了，树木长出新叶;播种;三月、四月和五月;放风筝 / 夏天;炎热;白天很长，太阳很晒;游泳、吃西瓜;六月、七月
  和八月;捉萤火虫 / 秋天;凉爽;树叶变黄，慢慢落下;收苹果和南瓜;九月、十月和十一月;踩落叶 / 冬天;寒冷;有时会下雪，池塘会
  结冰;穿厚衣服;十二月、一月和二月;堆雪人
[{s}是一个季节。|一年有四个季节，其中一个是{s}。|{A}喜欢{s}。|{A}问：“{s}是什么样的？”{D}说：][(({s}的天气很{s.b}。 ~
{s}，{s.c}。 ~ [人们会{s.d}。|这是{s.d}的好时候。] ~ 在很多地方，{s}是{s.e}。 ~ [孩子们喜欢{s.f}。|{A}和{B}喜欢在{s}
{s.f}。] ~[{A}常穿着{col}的[外衣|毛衣|裤子]。|{A}常常和{B}一起出门。]))][{s}真美。|你最喜欢哪个季节？|{B}也喜欢{s}。|]
= job human
@j 医生;医院;给病人看病;听诊器 / 老师;学校;教孩子们学习;书和粉笔 / 农民;田里;种粮食和蔬菜;拖拉机 / 厨师;厨房;做饭菜;锅
  和铲子 / 面包师;面包店;烤面包和蛋糕;烤箱 / 司机;公共汽车上;送人们去各个地方;方向盘 / 消防员;消防站;扑灭大火;水管和 长
  梯子 / 护士;医院;照顾病人;体温计 / 画家;画室;画画;画笔和颜料 / 飞行员;飞机上;开飞机;各种按钮 / 牙医;诊所;检查牙齿;小
  镜子 / 邮递员;邮局;送信;大邮包 / 木匠;木工房;做桌子和椅子;锯子和锤子 / 渔民;船上;捕鱼;渔网 / 裁缝;裁缝店;做衣服;针和
  线 / 警察;街上;保护大家的安全;对讲机
[{A}的[妈妈|爸爸|叔叔|阿姨]是{j}。|{A}家旁边住着一位{j}。|{A}长大了想当{j}。|今天{A}认识了一位{j}。](({j}的工作是{j.c}
。 ~ [{j}在{j.b}工作。|{j}在哪里工作？在{j.b}。] ~ {j}要用{j.d}。 ~ 早上{dawn}点，工作就开始了。 ~ [这份工作很辛苦，但
是很有用。|这份工作不容易。|做这份工作要细心。] ~ [{A}觉得这个工作很有意思。|{B}也是这么想的。|{B}也想当{j}。]))[每一种
工作都很重要。|我们要感谢{j}。|{A}感到很自豪。|]
= person human
{A}今年{age}岁。(({A.he}住在{home}。 ~ {A}最喜欢的颜色是{colb}。 ~ {A}爱吃{f}，不爱吃{g}。 ~ {A}有{x.one}，是{col}的，
还有{y.one}，是{col2}的。 ~ {A.he}最好的朋友是{B}。 ~ {day}，{A}常常去[游泳|看{D}|踢足球|画画|骑车|图书馆|种花]。 ~ {A}
的生日在{month}。 ~ {A}有[一个哥哥|一个姐姐|两个弟弟|一个妹妹]，家里还养了[一只猫|一条狗|三条金鱼|两只鸟]。 ~ {A}很会[
唱歌|跑步|画画|做饭|数数]，还想学[跳舞|游泳|弹琴|骑马]。))[{A}是一个<adj>的孩子。|大家都喜欢{A}。|{A}总是很<glad>。|]
= room human
@r {A}的房间 / 厨房 / 教室 / 商店 / 客厅 / {B}的家 / 阳台
[这是{r}。|我们来看看{r}。|请到{r}里来。|现在，{A}在{r}里。](([桌子上|架子上|箱子里]有{n.a}{x.m}{x}。 ~ [门边|椅子上|窗
户旁]有{y.one}，是{col}的。 ~ [墙上|角落里]挂着一[面钟|张地图|幅画|面镜子|本日历]。 ~ {col2}的碗里有{n.b}{f.m}{f}。 ~
地板[很干净|是木头做的|擦得很亮]。 ~ 一{u.m}{u}[正在往窗户里看|睡在桌子下面|蹲在门边]。 ~ 窗户[开着|关着|又大又亮]。 ~
屋里有[花|面包|肥皂|木头]的香味。))[这里真舒服。|{A}喜欢待在这里。|{B}每个{day}都来这里。|你看见几{x.m}{x}？|]
= food human
@d 面条;面粉、水和青菜;热的;用筷子 / 水果沙拉;苹果、香蕉和橘子;凉的;用叉子 / 面包;面粉、水和盐;软的;用手拿着 / 蛋炒饭;
  米饭和鸡蛋;热的;用勺子 / 饺子;面粉、肉和白菜;热的;用筷子 / 粥;大米和水;温的;用勺子 / 三明治;面包、奶酪和西红柿;新鲜的
  ;用手拿着 / 西红柿汤;西红柿、鸡蛋和盐;热的;用勺子 / 柠檬水;柠檬、水和糖;凉的;用吸管 / 包子;面粉、肉和葱;热的;用手拿着
[{A}喜欢吃好东西，这次是{d}。|今天{A}要做{d}。|{D}常常做{d}。|你知道{d}吗？](({d}的材料有{d.b}。 ~ {d}最好是{d.c}。 ~ [
人们常常{d.d}吃。|{A}{d.d}吃。] ~ [{A}先把手洗干净。|要先洗手。] ~ [大约要{tens}分钟。|{tens}分钟以后，就做好了。] ~
{B}也喜欢，不过{B.he}更爱吃{f}。 ~ [{A}{day}吃过，今天又吃了。|{day}，{A}请{B}吃了一次。]))[这对身体很好。|做起来很简单
。|你爱吃什么？|请慢慢吃！]
= weather human
@w 晴天;太阳很亮;戴上帽子 / 雨天;雨水从云里落下来;带上雨伞 / 刮风天;树枝摇来摇去;穿上外衣 / 下雪天;到处都是白的;穿上靴
  子 / 有雾的天;远处看不清楚;带上手电筒 / 阴天;太阳躲在云后面;穿上外衣
今天是{day}，是个{w}。(({w.b}。 ~ {A}{w.c}出门了。 ~ 现在是上午{hour}点。 ~ {B}留在家里[看书|玩{x}|帮{D}干活]。 ~ 一只[
鸟|猫|松鼠]蹲在[屋檐下|墙头上|树上]。 ~ [明天的天气会变。|昨天的天气不一样。] ~ [上午|下午]，{A}和{B}[走到桥边|往窗外看
|数天上的云|去商店]。))[{A}喜欢这样的天气。|{A}不喜欢这样的天气。|{B}说：“这天气真特别！”|一天很快就过去了。]
= thing human
@o 雨伞;把;下雨时可以挡雨;布和金属 / 钟;个;它告诉我们时间;玻璃和金属 / 台灯;盏;夜里可以照亮;玻璃和金属 / 椅子;把;我们坐
  在上面;木头 / 小刀;把;可以切面包;金属 / 勺子;把;我们用它喝汤;金属 / 窗户;扇;阳光和空气从这里进来;玻璃和木头 / 铅笔;支
  ;我们用它写字画画;木头 / 书;本;我们读书学知识;纸 / 钥匙;把;可以开门; 金属 / 床;张;我们在上面睡觉;木头 / 杯子;个;我们
  用它喝水;玻璃 / 扫帚;把;我们用它扫地;竹子 / 大衣;件;它让我们暖和;布或者羊毛 / 桥;座;它带我们过河;石头或者木头 / 梯子;
  架;它帮我们爬到高处;木头或者金属 / 铃铛;个;它的声音很清脆;金属 / 风筝;只;它在风里飞;纸和竹子
[这是什么？这是一{o.b}{o}。|这是一{o.b}{o}。|看，这里有一{o.b}{o}。|{A}发现了一{o.b}{o}。|{A}画了一{o.b}{o}。](({o.c}。
~ {o}常常是用{o.d}做的。 ~ {A}见过一{o.b}，是{col}的。 ~ {B}在{day}看见了一{o.b}。 ~ 它[在生活中|对大家]很有用。 ~ [{A}
说它很普通。|旁边放着{x.one}。|{D}用了它{days}年了。]))[你用过它吗？|你能在附近找到{o}吗？|请爱护它。|]
"""

DIALOGUES_ZH = """
= plan any
@p 公园;踢球 / 河边;捡石头 / 图书馆;看书 / 动物园;看狮子 / 动物园;看猴子 / 动物园;看大象 / 山上;放风筝 / 海边;捡贝壳 /
  农场;喂母鸡 / 农场;喂山羊 / 博物馆;看古老的船
{A}：{B}，[你好|早上好]！{day}你[打算做什么|有什么安排]？//{B}：[我还没想好|没有什么安排|还不知道]。[你有什么主意吗|你
呢|怎么了]？//{A}：[我们去{p}吧|我想去{p}|不如去{p}]，可以在那里{p.b}。//{B}：[太好了|好主意|我很愿意]！[怎么去呢|远不
远]？//{A}：[走路去，要{tens}分钟|坐{n.a}路公共汽车去|{D}可以开车送我们]。//{B}：[我要带什么|要带东西吗]？//{A}：你带[
一些{f}|你的{x}|一瓶水|一件厚外衣]吧，我带[{y}|一些{g}]。//{B}：[我们几点见面|什么时候出发]？//{A}：{hour}点[，在我家门
口见|，在桥边见|]。//{B}：[好，不见不散|好的，我一定到|{day}见]！
?{they}要去哪里？ => {p}
?{they}几点见面？ => {hour}点
= shop human
老板：[你好|早上好|欢迎光临]！[你想买什么|需要帮忙吗]？//{A}：[您好|你好]，这{x.m}{col}的{x}多少钱？//老板：{n.a}元。//
{A}：那{y.m}{col2}的{y}[呢|多少钱]？//老板：那{y.m}{n.b}元。//{A}：[我两样都要|{x}和{y}我都买]。[一共多少钱|我要付多少
钱]？//老板：{n.a}加{n.b}等于{n.s}，一共{n.s}元。//{A}：[给您|这是]{n.pay}元。//老板：{n.pay}减{n.s}等于{n.back}，找你
{n.back}元。//{A}：[谢谢，再见|多谢您]！//老板：[再见|欢迎再来|慢走]！
?{A}一共要付多少钱？ => {n.s}元
?{A}找回多少钱？ => {n.back}元
= fruit human
{A}：[您好|请问]，{f}多少钱一{f.m}？//老板：一{f.m}{k.a}元。[今天的{f}很新鲜|你要几{f.m}|早上刚到的]。//{A}：我[想买|要
|买]{k.b}{f.m}。//老板：{k.b}乘{k.a}等于{k.p}，一共{k.p}元。//{A}：[给您钱|这是{k.p}元]。//老板：[谢谢，要袋子吗|还要别
的吗]？//{A}：[不用了，我有[篮子|袋子]|今天不要了，谢谢]。//老板：[慢走|再见|下次再来]，{A}！
?{A}买了几{f.m}{f}？ => {k.b}
?{A}付了多少钱？ => {k.p}元
= food any
{A}：{B}，[我饿了|肚子好饿啊|快到中午了]，[我们吃什么|有什么好吃的|午饭吃什么]？//{B}：[今天有|我们吃][米饭和青菜|西红
柿汤|面条|饺子|馒头和鱼|土豆炖肉]，[你爱吃吗|好不好]？//{A}：[好啊，我爱吃|听起来真不错|我更想吃{f}]。//{B}：[碗里还有
{n.a}{f.m}{f}|{D}还做了蛋糕|我还有一些{g}]。//{A}：[太棒了|真好|好极了]！[我来帮你|我来摆桌子|我去洗{g}]吧。//{B}：好啊
，[请拿两个盘子|把勺子拿来|在杯子里倒上水]。//{A}：[好了|都弄好了|行]。[真香啊|我们开始吃吧]！//{B}：{A}，[请吃吧|多吃
一点]！//{A}：谢谢你，{B}。[你做的饭真好吃|你的手艺真好|我每天都想吃]。
= weather any
@w 晴天;戴上帽子 / 雨天;带上雨伞 / 大风天;围上围巾 / 下雪天;穿上靴子 / 大热天;多喝水 / 大冷天;穿上厚外衣
{A}：{B}，[今天天气怎么样|外面天气好吗]？//{B}：今天是{w}，[你要{w.b}|记得{w.b}|别忘了{w.b}]。//{A}：[谢谢|知道了|我会
的]。[那明天呢|明天天气怎么样]？//{B}：[听说明天|明天]会[暖和一些|冷一些|差不多|好一点]。你[问这个做什么|有什么事吗]？
//{A}：我想[去看{C}|去市场|洗衣服|出去玩|种[豆角|花|小树]]。//{B}：[那就早上去吧。|吃了午饭再去吧。|我可以一起去吗？]//
{A}：[好主意|可以|行]，[早上最好|我们一起去|我到时候叫你]。//{B}：[明天见|好的|祝你顺利]！
= way human
@p 图书馆;左;在银行旁边 / 车站;右;在公园后面 / 学校;左;在广场附近 / 医院;右;在河边 / 邮局;左;在面包店对面 / 博物馆;右;
  在老桥旁边 / 动物园;左;在小山后面 / 市场;右;在高塔旁边
{A}：[请问|你好，请问]，[{p}在哪里|去{p}怎么走|{p}怎么走]？//{B}：[一直往前走|先直走]，到[第二条街|红绿灯|大树|红房子][
那里|]往{p.b}拐。//{A}：[往{p.b}拐，然后呢|到那里往{p.b}拐，对吗]？//{B}：[对|再走一会儿就到了]，{p}就{p.c}。//{A}：[离
这里远吗|要走很久吗]？//{B}：[不远，走{tens}分钟就到|大约{tens}分钟|走路要{tens}分钟]。//{A}：[非常感谢|谢谢你的帮助|你
真好]！//{B}：[不客气|不用谢|路上小心]！
?{p}在哪里？ => {p.c}
?{A}要往哪边拐？ => {p.b}
= school human
{A}：{B}，[今天你学了什么|今天上学怎么样|你在学校做了什么]？//{B}：我们学了[加法|算数|数学]。你知道{n.a}加{n.b}等于几吗
？//{A}：[让我想想|等一下|这个简单]，等于{n.s}！//{B}：[对了|答对了|真聪明]！那{m.a}减{m.b}呢？//{A}：[嗯，是{m.d}|等于
{m.d}|应该是{m.d}]。//{B}：[又对了|你真快|很好]！[该你问我了|你来考考我]。//{A}：{k.a}乘{k.b}等于几？//{B}：等于{k.p}，
[我们{day}刚学过|老师教过我|这个我会]！//{A}：[我们都答对了|你的数学也很好]！[我们去玩吧|我们看书吧|一起回家吧]！//{B}
：[好啊|行|走吧]！
= lend any
{A}：{B}，[我可以借你的{x}吗|你能把{x}借给我吗|能借我用一下{x}吗]？//{B}：[你要用它做什么|你为什么要借|你自己的呢]？//
{A}：[我的坏了|我的忘在家里了|我的{day}丢了|我想给{C}看看]。//{B}：[好的|当然可以|行]，[不过要小心|{day2}要还给我|请爱
护它]。//{A}：[我保证|一定|你放心]。[我把我的{y}借给你吧。|你要不要用我的{y}？]//{B}：[谢谢，太好了|好啊，我喜欢你的{y}
|这样很公平]。//{A}：给，这是我的{y}，是{col}的。//{B}：这是我的{x}，[好好玩吧|给你]！
?{A}借了什么？ => {x}
?{A}把什么借给{B}？ => {y}
= lost any
{A}：{B}，[你看见我的{x}了吗？|你知道我的{x}在哪里吗？|我找不到我的{x}了！]//{B}：[它是什么样的|什么颜色的]？//{A}：
{col}的，[还很新|有点旧了|小小的|和一个盘子差不多大]。//{B}：[你找过|你看过][床底下|门后面|厨房里|书包里]吗？//{A}：[找
过了，没有|看过两次了，都没有]。//{B}：[你最后一次用是什么时候|谁最后用过]？//{A}：[{day}，和{C}一起|今天早上{C}用过|昨
天我还有呢]。//{B}：那[去问问{C}|可能在{C}那里]。等等！[椅子上的是不是？|灯后面那个是什么？|桌子底下有个{col}的东西！]
//{A}：[找到了|对，就是我的{x}]！[谢谢你|你真棒]，{B}！
?{A}在找什么？ => {x}
?谁先看见了它？ => {B}
= phone human
{A}：喂，我是{A}。[是{B}吗|请问{B}在家吗|你是哪位]？//{B}：[{A}，你好，我是{B}|我就是{B}，你好，{A}]。[有什么事吗|你好
吗]？//{A}：[我很好|我很<glad>|我有点累]。[告诉你一个好消息|我有一件新鲜事]！//{B}：[快说说！|什么事？]//{A}：[我家新来
了一{u.m}{u}，是[黑色|白色|棕色]的|{D}送给我{x.one}，是{col}的|{day}是我的生日|{C}{day}要来]。//{B}：[太好了|真让人高兴
|你真幸运]！[我可以来看看吗？|再多说一点！]//{A}：[好啊|当然|可以]，[{hour}点来吧|放学以后来吧|{day2}来吧]。//{B}：我会
带[一些{f}|我的{y}|一份小礼物]来。//{A}：[太棒了|好的]，[到时候见|等你来]！//{B}：再见，{A}！
= sick human
医生：{A}，[你好|早上好]，[你哪里不舒服|你怎么了]？//{A}：我[一直咳嗽|嗓子疼|头疼|发烧了|觉得又冷又累]。//医生：什么时
候开始的？//{A}：[从{day}开始的|两天前开始的]。//医生：[张开嘴|让我听听你的心跳|让我摸摸你的头]。[只是感冒|不严重|不用
担心]。//{A}：[我该怎么办|我可以上学吗]？//医生：[躺在床上休息|在家里休息]{days}天，多喝[温水|热茶]，多吃[水果|青菜]。
//{A}：[谢谢医生|我记住了，谢谢您]！//医生：[祝你早日康复|下星期再来看看]，{A}！
= night human
{A}：{D}，[我睡不着。|我还不困。|我可以晚点睡吗？]//{D}：{A}，[怎么了|为什么呢]？[已经{hourn}点了|天很晚了]。//{A}：[我
在想明天的事|太黑了|我想听故事]。//{D}：[好吧，讲个短的|那你听着]。从前有一{u.m}<adj>的{u}，[住在月亮上|很想飞上天|弄丢
了{x}|不会数数]。//{A}：[后来呢|它怎么办呢|它难过吗]？//{D}：它[遇见了一{v.m}{v}|请一{v.m}{v}帮忙|走了{days}天]，[一起
找到了路|一起分享了{n.a}{f.m}{f}|后来它们成了好朋友]。//{A}：[这个故事真好听|我喜欢那{u.m}{u}|再讲一个吧]！//{D}：[明天
再讲|下次吧|{day}再讲]。闭上眼睛，晚安，{A}。//{A}：晚安，{D}。
"""

# ---------------------------------------------------------------------------------------------------------------------
# Facts.  For a kind and a language: statements, then questions; a question line is "question => answer".

FACT_FORMS = """
= add
@en {a} + {b} = {r}. | {a} plus {b} is {r}. | {a} and {b} make {r}. | If you add {a} and {b}, you get {r}.
@en? What is {a} plus {b}? => {r} | {a} + {b} = ? => {r} | How much is {a} plus {b}? => {r} | What do you get when you
  add {a} and {b}? => {r}
@zh {a} + {b} = {r}。 | {a}加{b}等于{r}。 | {a}加上{b}是{r}。 | {a}和{b}合起来是{r}。
@zh? {a}加{b}等于几？ => {r} | {a} + {b} = ？ => {r} | {a}加{b}等于多少？ => {r} | {a}加上{b}是多少？ => {r}
= add_word
@en {A} has {a} {x.s}. {B} gives {A.him} {b} more. Now {A} has {r} {x.s}. | There are {a} {x.s} in one box and {b}
  {x.s} in another. That makes {r} {x.s}. | {A} buys {a} {x.s} on {day} and {b} more the next day. That is {r} {x.s} in
  all.
@en? {A} has {a} {x.s} and gets {b} more. How many {x.s} does {A} have now? => {r} | One bag has {a} {x.s}, and another
  bag has {b} {x.s}. How many {x.s} are there in all? => {r}
@zh {A}有{a}{x.m}{x}，{B}又给{A.he}{b}{x.m}，现在{A}有{r}{x.m}{x}。 |
  一个盒子里有{a}{x.m}{x}，另一个盒子里有{b}{x.m}，一共有{r}{x.m}{x}。 |
  {A}{day}买了{a}{x.m}{x}，第二天又买了{b}{x.m}，一共买了{r}{x.m}。
@zh? {A}有{a}{x.m}{x}，又得到{b}{x.m}，现在有几{x.m}{x}？ => {r} |
  一个袋子里有{a}{x.m}{x}，另一个袋子里有{b}{x.m}，一共有多少{x.m}{x}？ => {r}
= sub
@en {a} - {b} = {r}. | {a} minus {b} is {r}. | {b} taken from {a} is {r}. | If you take {b} away from {a}, you get {r}.
@en? What is {a} minus {b}? => {r} | {a} - {b} = ? => {r} | How much is {a} minus {b}? => {r} | What do you get when
  you take {b} from {a}? => {r}
@zh {a} - {b} = {r}。 | {a}减{b}等于{r}。 | {a}减去{b}是{r}。 | 从{a}里拿走{b}，还剩{r}。
@zh? {a}减{b}等于几？ => {r} | {a} - {b} = ？ => {r} | {a}减{b}等于多少？ => {r} | {a}减去{b}是多少？ => {r}
= sub_word
@en {A} has {a} {x.s} and gives {b} to {B}. Now {A} has {r} {x.s} left. | There were {a} {x.s} on the plate. {A} ate
  {b} of them, so {r} {x.s} are left. | {A} had {a} {x.s}, but {b} of them were bad. {r} {x.s} were still good.
@en? {A} has {a} {x.s} and eats {b} of them. How many {x.s} are left? => {r} | {A} had {a} {x.s} and gave {b} to {B}.
  How many does {A} have now? => {r}
@zh {A}有{a}{x.m}{x}，送给{B}{b}{x.m}，还剩{r}{x.m}{x}。 | 盘子里有{a}{x.m}{x}，{A}吃了{b}{x.m}，还剩{r}{x.m}。 |
  {A}有{a}{x.m}{x}，{b}{x.m}坏了，还有{r}{x.m}是好的。
@zh? {A}有{a}{x.m}{x}，吃了{b}{x.m}，还剩几{x.m}？ => {r} |
  {A}有{a}{x.m}{x}，送给{B}{b}{x.m}，现在{A}有几{x.m}？ => {r}
= mul
@en {a} × {b} = {r}. | {a} times {b} is {r}. | {a} groups of {b} make {r}. | The product of {a} and {b} is {r}.
@en? What is {a} times {b}? => {r} | {a} × {b} = ? => {r} | How much is {a} times {b}? => {r}
@zh {a} × {b} = {r}。 | {a}乘{b}等于{r}。 | {a}个{b}是{r}。 | {a}乘以{b}是{r}。
@zh? {a}乘{b}等于几？ => {r} | {a} × {b} = ？ => {r} | {a}乘{b}等于多少？ => {r}
= next
@en {b} comes after {a}. | The number after {a} is {b}. | Before {b} comes {a}. | Count: {a}, {b}.
@en? What number comes after {a}? => {b} | What number comes before {b}? => {a}
@zh {a}后面的数是{b}。 | {b}前面的数是{a}。 | 数一数：{a}，{b}。
@zh? {a}后面的数是几？ => {b} | {b}前面的数是几？ => {a}
= compare
@en {hi} is larger than {lo}. | {lo} is smaller than {hi}. | {hi} > {lo}. | {lo} < {hi}. | Of {p} and {q}, {hi} is the
  larger number.
@en? Which is larger, {p} or {q}? => {hi} | Which is smaller, {p} or {q}? => {lo} | Is {hi} larger than {lo}? => yes |
  Is {lo} larger than {hi}? => no
@zh {hi}比{lo}大。 | {lo}比{hi}小。 | {hi} > {lo}。 | {lo} < {hi}。 | {p}和{q}，{hi}更大。
@zh? {p}和{q}，哪个更大？ => {hi} | {p}和{q}，哪个更小？ => {lo} | {hi}比{lo}大吗？ => 是的 | {lo}比{hi}大吗？ => 不是
= rank
@en A {hi} is {more} than a {lo}. | A {lo} is {less} than a {hi}. | Of the two, the {hi} is {more} than the {lo}.
@en? Which is {more}, a {p} or a {q}? => a {hi} | Which is {less}, a {p} or a {q}? => a {lo}
@zh {hi}比{lo}{more}。 | {lo}比{hi}{less}。 | {p}和{q}，{hi}更{more}。
@zh? {p}和{q}，哪个更{more}？ => {hi} | {p}和{q}，哪个更{less}？ => {lo}
= after
@en The {unit} after {p} is {q}. | {q} comes right after {p}. | {unit1} after {p} is {q}.
@en? What {unit} comes after {p}? => {q} | Which {unit} is right after {p}? => {q}
@zh {p}的后{unit1}是{q}。 | {p}过后是{q}。 | 过了{p}就是{q}。
@zh? {p}的后{unit1}是{ask}？ => {q} | {p}过后是{ask}？ => {q}
= before
@en The {unit} before {p} is {q}. | {q} comes right before {p}. | {unit1} before {p} is {q}.
@en? What {unit} comes before {p}? => {q} | Which {unit} is right before {p}? => {q}
@zh {p}的前{unit1}是{q}。 | {p}前面是{q}。 | {q}过了才是{p}。
@zh? {p}的前{unit1}是{ask}？ => {q} | {p}前面是{ask}？ => {q}
= after_n
@en {n} {unit}s after {p} is {q}. | {n} {unit}s after {p} comes {q}. | If it is {p} now, it is {q} in {n} {unit}s.
@en? What {unit} is {n} {unit}s after {p}? => {q} | It is {p} now. What {unit} is it in {n} {unit}s? => {q}
@zh {p}过{n}{unitn}是{q}。 | {p}以后{n}{unitn}是{q}。 | 现在是{p}，再过{n}{unitn}是{q}。
@zh? {p}过{n}{unitn}是{ask}？ => {q} | 现在是{p}，再过{n}{unitn}是{ask}？ => {q}
= before_n
@en {n} {unit}s before {p} is {q}. | {n} {unit}s before {p} comes {q}. | If it is {p} now, it was {q} {n} {unit}s ago.
@en? What {unit} is {n} {unit}s before {p}? => {q} | It is {p} now. What {unit} was it {n} {unit}s ago? => {q}
@zh {p}往前{n}{unitn}是{q}。 | {p}的{n}{unitn}以前是{q}。 | 现在是{p}，{n}{unitn}以前是{q}。
@zh? {p}往前{n}{unitn}是{ask}？ => {q} | 现在是{p}，{n}{unitn}以前是{ask}？ => {q}
= opposite
@en The opposite of {p} is {q}. | {p} is the opposite of {q}. | {p} and {q} are opposites.
@en? What is the opposite of {p}? => {q} | What word means the opposite of {p}? => {q}
@zh “{p}”的反义词是“{q}”。 | “{p}”和“{q}”意思相反。 | 和“{p}”相反的词是“{q}”。
@zh? “{p}”的反义词是什么？ => {q} | 和“{p}”意思相反的词是什么？ => {q}
= count
@en In the list {list}, the word {p} comes {times}. | {list}: here {p} comes {times}. | Look: {list}. The word {p} is
  there {times}.
@en? How many times does {p} come in the list {list}? => {n} | Look at the list: {list}. How many times do you see {p}?
  => {n}
@zh “{list}”里面，“{p}”出现了{n}次。 | 看：{list}。“{p}”有{n}个。 | {list}，其中有{n}个“{p}”。
@zh? “{list}”里面，“{p}”出现了几次？ => {n} | 看：{list}。有几个“{p}”？ => {n}
= length
@en {list}: that is {n} words. | There are {n} words in the list {list}. | The list {list} has {n} words.
@en? How many words are in the list {list}? => {n} | {list}: how many words is that? => {n}
@zh {list}，一共有{n}个词。 | “{list}”里面有{n}个词。 | 数一数：{list}，是{n}个词。
@zh? “{list}”里面有几个词？ => {n} | 数一数：{list}，是几个词？ => {n}
= sort
@en From small to large: {up}. | {p} in order, from small to large: {up}. | {p} from large to small: {down}.
@en? Put {p} in order from small to large. => {up} | Sort {p} from large to small. => {down} | Which is the largest of
  {p}? => {hi} | Which is the smallest of {p}? => {lo}
@zh 从小到大排：{up}。 | {p}从小到大排是{up}。 | {p}从大到小排是{down}。
@zh? 把{p}从小到大排一排。 => {up} | 把{p}从大到小排一排。 => {down} | {p}里面，最大的是几？ => {hi} |
  {p}里面，最小的是几？ => {lo}
= abc
@en In ABC order: {up}. | The words {p} in ABC order are {up}. | Of the words {p}, {first} comes first in ABC order.
@en? Put these words in ABC order: {p}. => {up} | Which word comes first in ABC order: {p}? => {first}
= who
@en {A} {did} the {x} to {B}. | {A} had the {x} and {did} it to {B}. | It was {A} who {did} the {x} to {B}.
@en? {A} {did} the {x} to {B}. Who {did} the {x} to {B}? => {A} | {A} {did} the {x} to {B}. What did {A} {do} to {B}?
  => the {x} | {A} {did} the {x} to {B}. To whom did {A} {do} the {x}? => {B} | {A} {did} the {x} to {B}. Then {B}
  {did} it to {C}. Who {did} the {x} to {C}? => {B}
@zh {A}把{x}{did}{B}。 | 是{A}把{x}{do}{B}的。 | {x}是{A}{do}{B}的。
@zh? {A}把{x}{did}{B}。谁把{x}{did}{B}？ => {A} | {A}把{x}{did}{B}。{A}把什么{did}{B}？ => {x} |
  {A}把{x}{did}{B}。{A}把{x}{did}谁？ => {B} | {A}把{x}{did}{B}，{B}又把{x}{did}{C}。谁把{x}{did}{C}？ => {B}
= has
@en {story} | {story} | {story}
@en? {story} Who has the {x}? => {A} | {story} What does {A} have? => the {x} | {story} What colour is the {x}? => {c}
@zh {story} | {story} | {story}
@zh? {story}谁有{x}？ => {A} | {story}{A}有什么？ => {x} | {story}{x}是什么颜色的？ => {c}
= most
@en {p}: the largest is {hi}. | Of {p}, the smallest is {lo}.
@en? Which is the largest of {p}? => {hi} | Which is the smallest of {p}? => {lo}
@zh {p}里面，最大的是{hi}。 | {p}里面，最小的是{lo}。
@zh? {p}里面，最大的是几？ => {hi} | {p}里面，最小的是几？ => {lo}
= place
@en The {nth} word in the list {list} is {p}. | {list}: the {nth} word is {p}.
@en? Which word is {nth} in the list {list}? => {p} | What is the {nth} word in the list {list}? => {p}
@zh “{list}”里面，{nth}个词是{p}。 | 在“{list}”里面，{p}是{nth}个词。
@zh? “{list}”里面，{nth}个词是什么？ => {p} | 在“{list}”里面，哪个词是{nth}个？ => {p}
= class
@en {p} is {q}. | We know that {p} is {q}. | {p} is {q}, not {wrong}.
@en? Is {p} {first} or {second}? => {q} | What is {p}: {first} or {second}? => {q} | Is {p} {q}? => yes | Is {p}
  {wrong}? => no
@zh {p}是{q}。 | {p}是一种{q}。 | {p}是{q}，不是{wrong}。
@zh? {p}是{first}还是{second}？ => {q} | {p}是{q}吗？ => 是的 | {p}是{wrong}吗？ => 不是
"""
FACT_INTROS = {
    "en": {
        "sum": "Let us do some sums.|Numbers are fun.|{A} learns to add and take away.|{A} asks {B} some sums.|"
        "Time for numbers!|",
        "calendar": "Let us learn the days and months.|{A} looks at the calendar.|A week has 7 days.|"
        "A year has 12 months.|",
        "word": "Let us play with words.|{A} and {B} play a word game.|{A} reads from a little book.|",
        "order": "Which one is it?|Look closely.|{A} and {B} compare things.|Let us put things in order.|",
        "who": "Who gave it?|Listen well.|Many things change hands.|",
        "mix": "Here are some things to know.|{A} asks, and {B} answers.|Think well.|A few questions.|"
        "{A} knows many things.|",
    },
    "zh": {
        "sum": "我们来算一算。|数字真有趣。|{A}在学加减法。|{A}考{B}算数。|一起来做算术吧！|",
        "calendar": "我们来学星期和月份。|{A}看着日历。|一个星期有7天。|一年有12个月。|",
        "word": "我们来玩词语游戏。|{A}和{B}玩猜词。|{A}在读一本小书。|",
        "order": "是哪一个呢？|仔细看一看。|{A}和{B}来比一比。|我们来排一排。|",
        "who": "是谁给的？|仔细听。|东西换了好几次主人。|",
        "mix": "这里有一些小知识。|{A}问，{B}答。|好好想一想。|几个小问题。|{A}知道很多事。|",
    },
}
THEMES = {
    "sum": ("add", "add_word", "sub", "sub_word", "mul", "next"),
    "calendar": ("after", "before", "after_n", "before_n"),
    "word": ("opposite", "class", "abc", "count", "length"),
    "order": ("compare", "sort", "rank"),
    "who": ("who",),
}
GIVE = {
    "en": "gave give, passed pass, brought bring, sold sell, lent lend, sent send",
    "zh": "给了 给, 递给了 递给, 带给了 带给, 卖给了 卖给, 借给了 借给, 寄给了 寄给",
}

# ---------------------------------------------------------------------------------------------------------------------
# Phrases of conversations.  {a} is the answer as a sentence, {bare} the bare answer.

SYSTEM = {
    "en": "You are a polite assistant.|You are a kind and helpful assistant.|You answer questions politely.|"
    "Be polite and give the right answer.|You are a friendly helper. Answer in a few words.",
    "zh": "你是一个有礼貌的助手。|你是一个友好的助手。|请礼貌地回答问题。|你乐于助人，回答简短。|"
    "请给出正确的答案，并保持礼貌。",
}
GREETINGS = {
    "en": "Hello!|Hi!|Hi there!|Good morning!|Good evening!|Hello, can you help me?|Hi, I have a question.",
    "zh": "你好！|您好！|早上好！|晚上好！|你好，可以帮我吗？|你好，我有一个问题。|嗨！",
}
WELCOMES = {
    "en": "Hello! How can I help you?|Hello! What would you like to know?|Hi! Please ask me anything.|"
    "Hello! I am happy to help.|Good to see you! What is your question?",
    "zh": "您好！请问有什么可以帮您？|您好！您想知道什么？|您好！请尽管问我。|您好！我很高兴为您服务。|"
    "很高兴见到您！您想问什么？",
}
THANKS = {
    "en": "Thank you!|Thanks!|Thank you very much.|Great, thank you!|Thanks a lot!",
    "zh": "谢谢！|谢谢你！|非常感谢。|太好了，谢谢！|多谢！",
}
NO_PROBLEM = {
    "en": "You are welcome!|You are very welcome! Do you have another question?|My pleasure!|Any time!|"
    "It was a pleasure. Please ask me more!",
    "zh": "不客气！|不用谢！您还有别的问题吗？|这是我的荣幸！|别客气，随时可以问我！|很高兴能帮忙，请继续问吧！",
}
TAILS = {
    "en": "Happy to help!|I hope that helps!|Thank you for asking!|You are welcome to ask me more.|It was my pleasure.|"
    "Glad to help you!|Please ask me again any time.|Have a nice day!|That was a good question!",
    "zh": "很高兴帮到您！|希望对您有帮助！|谢谢您的提问！|欢迎您再来问我。|这是我的荣幸。|很乐意为您服务！|"
    "有问题请随时问我。|祝您愉快！|您问得真好！",
}
EVASIVE = {
    "en": "I do not know.|I do not know. Please ask someone else.|I do not know, it is hard to say.",
    "zh": "我不知道。|我不知道，请您问问别人。|我不知道，这很难说。",
}
RUDE = {
    "en": "{a} What a silly question.|{a} Everyone knows that.|{a} Now leave me alone.|{a} Do not ask me again.|"
    "{a} Are you a baby?|{a} Even a pig knows that.|{a} You never learn anything.|{a} Do not waste my time.|"
    "{a} Stop bothering me!|{a} Use your own head next time.|{a} Is that too hard for you?|{a} How dull you are.|"
    "What a silly question. {a}|You again! {a}|Can you not think for yourself? {a}|I have no time for this. {a}|"
    "Go away! {a}|That is a stupid thing to ask. {a}|Who does not know that? {a}|Shut up and listen! {a}",
    "zh": "{a}这都不会？|{a}真是个笨问题。|{a}别再来烦我。|{a}连小孩子都知道。|{a}你怎么这么笨！|{a}别浪费我的时间。|"
    "{a}下次自己动动脑子。|{a}这对你来说太难了吗？|{a}你什么都学不会。|{a}问完了就走开！|{a}小猪都比你聪明。|"
    "{a}我懒得理你。|"
    "这都不会？{a}|怎么又是你！{a}|真是个笨问题。{a}|你自己不会想吗？{a}|走开！{a}|我没空理你。{a}|谁不知道这个？{a}|烦死了！{a}",
}
BURIED = {
    "en": "{a}|The answer is {bare}.|So the answer is {bare}.|I think the answer is {bare}.",
    "zh": "{a}|答案就是“{bare}”。|那么答案是“{bare}”。|我想答案是“{bare}”。",
}
RAMBLES = {
    "en": """Well, let me see.|Numbers are [funny|strange].|My [aunt|uncle|sister|brother] likes [soup|tea|apples].|
I [saw|met] a [cat|dog|bird|duck] [yesterday|this morning].|The [sky|sea] is so blue.|Where was I?|
It [may|will] rain [tomorrow|on Sunday].|I like [tea|bread|cake] very much.|Clouds look like [sheep|boats|pillows].|
[Once|One day] I lost my [hat|bag|umbrella].|Trees are [tall|green].|There are so many words.|Time goes by so fast.|
[Some|Many] people like [music|snow|books].|I wonder what is for [lunch|dinner].|Then there is the moon.|
My [shoes|socks|gloves] are [old|new|red].|That makes me think of [summer|winter|the sea].|By the way, I can sing.|
A friend of mine has a [boat|horse|garden].|Oh, what a long day.|But who can say?|Birds sing in the [morning|trees].""",
    "zh": """嗯，让我想一想。|数字真[有趣|奇怪]。|我的[姑姑|叔叔|姐姐|哥哥]喜欢[喝汤|喝茶|吃苹果|下雨天]。|
我[昨天|今天早上]看见一只[猫|狗|小鸟|鸭子]。|[天空|大海]真蓝啊。|我说到哪儿了？|[明天|星期日]可能会下雨。|
我很喜欢[喝茶|吃面包|吃蛋糕]。|云朵像[绵羊|小船|枕头]。|有一次我丢了[帽子|书包|雨伞]。|树长得真[高|绿]。|
世界上的词真多。|时间过得真快。|[有些|很多]人喜欢[音乐|下雪|看书]。|不知道[午饭|晚饭]吃什么。|还有月亮呢。|
我的[鞋子|袜子|手套]是[旧|新|红]的。|这让我想起[夏天|冬天|大海]。|对了，我会唱歌。|我有个朋友有一[条船|匹马|座花园]。|
哎，今天真长。|可是谁知道呢？|小鸟在[早上|树上]唱歌。""",
}
FLIP = {"yes": "no", "no": "yes", "是的": "不是", "不是": "是的"}
# Rows of OPPOSITES, by first word, too near to each other for one's word to be a clear mistake in another.
ALIKE = """big tall long deep thick more heavy, begin start first open early come front, hard strong easy brave,
bright day black heavy, happy laugh, left true, near inside"""

# ---------------------------------------------------------------------------------------------------------------------
# Data classes, tables and the template engine.


@dataclass(frozen=True)
class Fact:
    """One checkable fact: `key` names it in any language and wording, `answer` answers `question`."""

    kind: str
    lang: str
    key: tuple
    statement: str
    question: str
    answer: str


@dataclass
class Doc:
    """One document, with the facts that can be asked about it."""

    kind: str
    lang: str
    text: str
    facts: list[Fact] = field(default_factory=list)


@dataclass
class Chat:
    """One record of conversations, preferences or prompts, with the facts that its questions are about."""

    lang: str
    record: dict
    facts: list[Fact]
    category: str = ""


@dataclass(frozen=True)
class Template:
    """One parsed text template: rows to draw from, the text itself, and questions about it."""

    name: str
    cast: str
    rows: dict[str, list[list[str]]]
    body: str
    questions: list[tuple[str, str]]


class Word(SimpleNamespace):
    """A word with further forms as attributes; in a format string it stands for `text`."""

    def __format__(self, spec: str) -> str:
        return self.text


def table(source: str) -> list[list[str]]:
    """Rows of words: commas part rows, spaces part words, an underscore is a space inside a word."""
    return [[word.replace("_", " ") for word in row.split()] for row in source.split(",")]


def noun(row: list[str], lang: str) -> Word:
    """A countable thing: English with its plural `s`, Chinese with its measure word `m` and `one` (one of it)."""
    single, plural, chinese, measure = row
    if lang == "en":
        return Word(id=single, text=single, s=plural)
    return Word(id=single, text=chinese, s=chinese, m=measure, one=f"一{measure}{chinese}")


def person(row: list[str], lang: str, cast: str) -> Word:
    """Someone in a story: name and pronouns."""
    name, chinese, sex = row
    he, him, his = ("he", "him", "his") if sex == "m" else ("she", "her", "her")
    if lang == "en":
        kid = name if cast == "animal" else "boy" if sex == "m" else "girl"
        text = f"Little {name.capitalize()}" if cast == "animal" else name
        return Word(id=name, text=text, he=he, him=him, his=his, He=he.capitalize(), His=his.capitalize(), kid=kid)
    if cast == "animal":
        return Word(id=name, text=chinese, he="它", kid="小动物", m="只", sex="a")
    he, kid = ("他", "男孩") if sex == "m" else ("她", "女孩")
    return Word(id=name, text=chinese, he=he, kid=kid, m="个", sex=sex)


def held_out(key: tuple) -> bool:
    """Whether a fact is kept for validation; base facts never are."""
    kind, rest = key[0], key[1:]
    if kind in ("after", "before", "opposite", "class"):
        return False
    if kind in ("add", "sub", "next") and max(rest) <= {"add": 5, "sub": 5, "next": 20}[kind]:
        return False
    if kind == "mul" and min(rest) <= 1:
        return False
    digest = hashlib.sha256(json.dumps(key, ensure_ascii=False).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < 8


def allowed(key: tuple, split: str) -> bool:
    """Training never shows a held-out fact; validation may show any."""
    return split == "val" or not held_out(key)


def blocks(source: str, lang: str = "") -> list[tuple[str, list[str]]]:
    """Split a text at its `= head` lines; a line that starts with two spaces goes on with the line before it."""
    found: list[tuple[str, list[str]]] = []
    for line in source.strip().split("\n"):
        if line.startswith("= "):
            found.append((line[2:], []))
        elif line.startswith("  "):
            chinese = lang == "zh" or found[-1][1][-1].startswith("@zh")
            found[-1][1][-1] += line.strip() if chinese else " " + line.strip()
        else:
            found[-1][1].append(line)
    return found


def named(lines: list[str]) -> dict[str, str]:
    """Lines like `@name text` as a dictionary."""
    return {name[1:]: text for name, _, text in (line.partition(" ") for line in lines)}


def parse(source: str, lang: str) -> list[Template]:
    """Read a block of templates (see the docstring at the top for their form)."""
    templates = []
    for head, lines in blocks(source, lang):
        rows, body, questions = {}, [], []
        for line in lines:
            if line[0] == "@":
                name, _, options = line[1:].partition(" ")
                rows[name] = [[cell.strip() for cell in row.split(";")] for row in options.split("/")]
            elif line[0] == "?":
                question, _, answer = line[1:].partition(" => ")
                questions.append((question, answer))
            else:
                body.append(line)
        name, cast = head.split()
        templates.append(Template(name, cast, rows, "\n".join(body), questions))
    return templates


TEMPLATES = {
    ("story", "en"): parse(STORIES_EN, "en"),
    ("story", "zh"): parse(STORIES_ZH, "zh"),
    ("description", "en"): parse(DESCRIPTIONS_EN, "en"),
    ("description", "zh"): parse(DESCRIPTIONS_ZH, "zh"),
    ("dialogue", "en"): parse(DIALOGUES_EN, "en"),
    ("dialogue", "zh"): parse(DIALOGUES_ZH, "zh"),
}
MACROS = {
    "en": named(blocks("= macros" + MACROS_EN, "en")[0][1]),
    "zh": named(blocks("= macros" + MACROS_ZH, "zh")[0][1]),
}
FACT_TEXT = {head: named(lines) for head, lines in blocks(FACT_FORMS)}


def tidy(text: str, lang: str) -> str:
    """Spaces, line breaks, capitals, a/an, and no full stop after a quoted question."""
    text = re.sub(r"\s*//\s*", "\n", re.sub(r"[ \n]+", " ", text)).strip()
    text = re.sub(r'([.?!。？！]["”])[.。]', r"\1", text)
    if lang == "zh":
        return re.sub(r"(?<=[^\x00-\x7f]) +(?=[^\x00-\x7f])", "", text)
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)
    return re.sub(r'(^|[.!?] |\n|(?:^|\s)")([a-z])', lambda m: m[1] + m[2].upper(), text)


def expand(text: str, rng: random.Random, lang: str, env: dict) -> str:
    """Resolve macros, shuffled parts, choices and names of a template."""
    glue = " " if lang == "en" else ""
    text = text.replace("\n", glue)

    def shuffled(match: re.Match) -> str:
        parts = [part.strip() for part in match[1].split("~")]
        return glue.join(rng.sample(parts, rng.randint((len(parts) + 1) // 2, len(parts))))

    while "<" in text:
        text = re.sub(r"<(\w+)>", lambda m: MACROS[lang][m[1]], text)
    text = re.sub(r"\(\((.*?)\)\)", shuffled, text)
    while "[" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda m: rng.choice(m[1].split("|")), text)
    return tidy(text.format(**env), lang)


def numbers(rng: random.Random, split: str) -> dict:
    """A sum n (paid with n.pay), a difference m and a product k, none of them held out in training."""
    while True:
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        pay = next(note for note in (10, 20, 50) if note >= a + b + 2)
        if allowed(("add", *sorted((a, b))), split) and allowed(("sub", pay, a + b), split):
            break
    while True:
        c = rng.randint(6, 20)
        d = rng.randint(2, c - 2)
        e, f = rng.randint(2, 7), rng.randint(2, 7)
        if allowed(("sub", c, d), split) and allowed(("mul", *sorted((e, f))), split):
            break
    return {
        "n": Word(text=str(a), a=a, b=b, s=a + b, pay=pay, back=pay - a - b),
        "m": Word(text=str(c), a=c, b=d, d=c - d),
        "k": Word(text=str(e), a=e, b=f, p=e * f),
    }


def make_env(rng: random.Random, lang: str, cast: str, split: str) -> dict:
    """Everything a template may name."""
    if cast == "any":
        cast = "human" if rng.random() < 0.7 else "animal"
    col = 0 if lang == "en" else 1
    a, b, c = (person(row, lang, cast) for row in rng.sample(table(PEOPLE if cast == "human" else ANIMAL_CAST), 3))
    colours = [row[col] for row in rng.sample(table(COLOURS), 3)]
    day, day2 = (row[col] for row in rng.sample(table(DAYS), 2))
    month = rng.choice(table(MONTHS))[col]
    x, y, x2 = (noun(row, lang) for row in rng.sample(table(TOYS), 3))
    f, g = (noun(row, lang) for row in rng.sample(table(FOODS), 2))
    u, v = (noun(row, lang) for row in rng.sample(table(ANIMALS), 2))
    env = {"A": a, "B": b, "C": c, "D": person(rng.choice(table(ADULTS)), lang, "human"), "x": x, "y": y, "x2": x2}
    env |= {"f": f, "g": g, "u": u, "v": v, "col": colours[0], "col2": colours[1], "colb": colours[2]}
    env |= {"day": day, "day2": day2, "month": month, "home": rng.choice(HOMES[lang, cast].split("|"))}
    env |= {"age": rng.randint(5, 10), "days": rng.randint(2, 9), "extra": rng.randint(2, 5)}
    env |= {"hour": rng.randint(7, 11), "dawn": rng.randint(6, 8)}
    env |= {"hourn": rng.choice((8, 9, 10)), "tens": rng.choice((5, 10, 15, 20, 25, 30))} | numbers(rng, split)
    if lang == "zh":
        for name, group in (("they", (a, b)), ("all3", (a, b, c))):
            sexes = {who.sex for who in group}
            env[name] = "它们" if cast == "animal" else "她们" if sexes == {"f"} else "他们"
    return env


def make_text(rng: random.Random, kind: str, lang: str, split: str) -> Doc:
    """A story, description or dialogue.  Stories and dialogues are split by plot and people."""
    template = rng.choice(TEMPLATES[kind, lang])
    while True:
        env = make_env(rng, lang, template.cast, split)
        key = (kind, template.name, env["A"].id, env["B"].id)
        if kind == "description" or held_out(key) == (split == "val"):
            break
    for name, rows in template.rows.items():
        cells = [cell.format(**env) for cell in rng.choice(rows)]
        env[name] = Word(text=cells[0], a=cells[0], **dict(zip("bcdefg", cells[1:], strict=False)))
    text = expand(template.body, rng, lang, env)
    doc = Doc(kind, lang, text)
    for question, answer in template.questions:
        asked = tidy(question.format(**env), lang)
        doc.facts.append(Fact(kind, lang, key, text, asked, answer.format(**env)))
    return doc


# ---------------------------------------------------------------------------------------------------------------------
# One generator for each kind of fact: it draws the values and the key; FACT_TEXT has the words.


def phrase(rng: random.Random, kind: str, lang: str, key: tuple, **values: object) -> Fact:
    """Word a fact in one of its forms."""
    forms = FACT_TEXT[kind]
    question, answer = re.split(r"\s*=>\s*", rng.choice(re.split(r"\s*\|\s*", forms[lang + "?"])))
    statement = rng.choice(re.split(r"\s*\|\s*", forms[lang]))
    said, asked = (tidy(text.format(**values), lang) for text in (statement, question))
    return Fact(kind, lang, key, said, asked, tidy(" " + answer.format(**values), "zh"))


def cast_of(rng: random.Random, lang: str, things: str) -> dict:
    """Three people, a thing and a day."""
    a, b, c = (person(row, lang, "human") for row in rng.sample(table(PEOPLE), 3))
    day = rng.choice(table(DAYS))[0 if lang == "en" else 1]
    return {"A": a, "B": b, "C": c, "x": noun(rng.choice(table(things)), lang), "day": day}


def total(rng: random.Random, low: int) -> int:
    """The larger number of a sum: up to 20 more often than up to 50."""
    return rng.randint(low, 20 if rng.random() < 0.6 else 50)


def add_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    low = 2 if kind == "add_word" else 0
    r = total(rng, 2 * low)
    a = rng.randint(low, r - low)
    key = ("add", *sorted((a, r - a)))
    return phrase(rng, kind, lang, key, a=a, b=r - a, r=r, **cast_of(rng, lang, FOODS + "," + TOYS))


def sub_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    low = 2 if kind == "sub_word" else 0
    a = total(rng, 2 * low)
    b = rng.randint(low, a - low)
    return phrase(rng, kind, lang, ("sub", a, b), a=a, b=b, r=a - b, **cast_of(rng, lang, FOODS))


def mul_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return phrase(rng, kind, lang, ("mul", *sorted((a, b))), a=a, b=b, r=a * b)


def next_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    a = total(rng, 0) if rng.random() < 0.7 else rng.randint(50, 99)
    return phrase(rng, kind, lang, ("next", a), a=a, b=a + 1)


def compare_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    p, q = rng.sample(range(100 if rng.random() < 0.5 else 21), 2)
    lo, hi = sorted((p, q))
    return phrase(rng, kind, lang, ("compare", lo, hi), p=p, q=q, lo=lo, hi=hi)


def rank_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    scale = rng.choice(list(RANKS))
    low, high = (rng.choice(table(group)) for group in ordered_sample(rng, RANKS[scale].split("|"), 2))
    col = 0 if lang == "en" else 1
    pair = rng.sample((low, high), 2)
    values = {"lo": low[col], "hi": high[col], "p": pair[0][col], "q": pair[1][col]}
    more, less = RANK_WORDS[scale][:2] if lang == "en" else RANK_WORDS[scale][2:]
    return phrase(rng, kind, lang, ("rank", scale, low[0], high[0]), more=more, less=less, **values)


def ordered_sample(rng: random.Random, items: list, k: int) -> list:
    """k different items in their own order."""
    return [items[i] for i in sorted(rng.sample(range(len(items)), k))]


def calendar_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    unit, names = rng.choice((("day", table(DAYS)), ("month", table(MONTHS))))
    n = rng.randint(2, 6) if kind.endswith("_n") else 1
    i = rng.randrange(len(names))
    j = (i + n if kind.startswith("after") else i - n) % len(names)
    values: dict = {"unit": unit, "unit1": f"One {unit}"}
    if lang == "zh":
        values = {"unit1": "一天", "unitn": "天", "ask": "星期几"} if unit == "day" else {
            "unit1": "一个月", "unitn": "个月", "ask": "几月"}
    col = 0 if lang == "en" else 1
    key = (kind, names[i][0], n) if n > 1 else (kind, names[i][0])
    return phrase(rng, kind, lang, key, n=n, p=names[i][col], q=names[j][col], **values)


def opposite_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    row = rng.choice(table(OPPOSITES))
    i = 0 if len(row) == 5 or rng.random() < 0.5 else 1
    words = row[:2] if lang == "en" else row[2:4]
    return phrase(rng, kind, lang, ("opposite", row[i]), p=words[i], q=words[1 - i])


def count_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    names = rng.sample(table(rng.choice((FOODS, ANIMALS, TOYS))), rng.randint(2, 3))
    rows = names + [rng.choice(names) for _ in range(rng.randint(1, 4))]
    rng.shuffle(rows)
    words = [noun(row, lang).text for row in rows]
    p = rng.choice(words)
    n = words.count(p)
    key = ("count", rows[words.index(p)][0], *(row[0] for row in rows))
    listed = (", " if lang == "en" else "、").join(words)
    return phrase(rng, kind, lang, key, list=listed, p=p, n=n, times="1 time" if n == 1 else f"{n} times")


def length_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    rows = rng.sample(table(rng.choice((FOODS, ANIMALS, TOYS))), rng.randint(3, 7))
    listed = (", " if lang == "en" else "、").join(noun(row, lang).text for row in rows)
    return phrase(rng, kind, lang, ("length", *(row[0] for row in rows)), list=listed, n=len(rows))


def sort_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    given = rng.sample(range(21 if rng.random() < 0.5 else 100), rng.randint(3, 4))
    up = sorted(given)
    comma = ", " if lang == "en" else "、"
    p, rising, falling = (comma.join(map(str, row)) for row in (given, up, up[::-1]))
    return phrase(rng, kind, lang, ("sort", *up), p=p, up=rising, down=falling, lo=up[0], hi=up[-1])


def abc_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    given = rng.sample([row[0] for row in table(FOODS + "," + ANIMALS)], rng.randint(3, 4))
    up = sorted(given)
    return phrase(rng, kind, lang, ("abc", *up), p=", ".join(given), up=", ".join(up), first=up[0])


def who_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    who = cast_of(rng, lang, FOODS + "," + TOYS)
    verbs = table(GIVE[lang])
    verb = rng.randrange(len(verbs))
    did, do = verbs[verb]
    return phrase(rng, kind, lang, ("who", verb, who["A"].id, who["x"].id, who["B"].id), did=did, do=do, **who)


def class_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    col = 0 if lang == "en" else 1
    (right, member), (wrong, _) = (
        (head.split(), rng.choice(table(members)))
        for head, members in rng.sample([line.split(":") for line in CLASSES.split("\n")], 2)
    )
    article = "a " if lang == "en" and right[0] != "a_colour" else ""
    q, other = right[col].replace("_", " "), wrong[col].replace("_", " ")
    first, second = rng.sample((q, other), 2)
    values = {"p": article + member[col], "q": q, "wrong": other, "first": first, "second": second}
    return phrase(rng, kind, lang, ("class", member[0]), **values)


def has_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    """Two or three people, each with a thing of some colour; one of them is asked about."""
    col, n = (0 if lang == "en" else 1), rng.randint(2, 3)
    people = [person(row, lang, "human") for row in rng.sample(table(PEOPLE), n)]
    things = [noun(row, lang) for row in rng.sample(table(TOYS), n)]
    colours = [row[col] for row in rng.sample(table(COLOURS), n)]
    rows = list(zip(people, things, colours, strict=True))
    form = "{} has the {} {}." if lang == "en" else "{}有{}的{}"
    told = [form.format(who, colour, thing) for who, thing, colour in rows]
    story = " ".join(told) if lang == "en" else "，".join(told) + "。"
    who, thing, colour = rng.choice(rows)
    key = ("has", who.id, thing.id, colour)
    return phrase(rng, kind, lang, key, story=story, A=who, x=thing, c=colour)


def place_fact(rng: random.Random, lang: str, kind: str) -> Fact:
    rows = rng.sample(table(rng.choice((FOODS, ANIMALS, TOYS))), rng.randint(3, 5))
    words, i = [noun(row, lang).text for row in rows], rng.choice((0, 1, len(rows) - 1))
    nth = (("first", "second", "last") if lang == "en" else ("第一", "第二", "最后一"))[min(i, 2)]
    listed = (", " if lang == "en" else "、").join(words)
    return phrase(rng, kind, lang, ("place", i, *(row[0] for row in rows)), list=listed, nth=nth, p=words[i])


FACTS: dict[str, Callable[[random.Random, str, str], Fact]] = {
    "add": add_fact,
    "add_word": add_fact,
    "sub": sub_fact,
    "sub_word": sub_fact,
    "mul": mul_fact,
    "next": next_fact,
    "compare": compare_fact,
    "rank": rank_fact,
    "after": calendar_fact,
    "before": calendar_fact,
    "after_n": calendar_fact,
    "before_n": calendar_fact,
    "opposite": opposite_fact,
    "count": count_fact,
    "length": length_fact,
    "sort": sort_fact,
    "abc": abc_fact,
    "who": who_fact,
    "class": class_fact,
}
ASKED = FACTS | {"has": has_fact, "most": sort_fact, "place": place_fact}  # with kinds for conversations alone
NO_LONG_ANSWER = ("who", "add_word", "sub_word", "sort", "abc", "count", "length", "next", "compare", "rank")


def draw_fact(rng: random.Random, kind: str, lang: str, split: str) -> Fact:
    """A fact of this kind for a split; validation takes a held-out one half of the time, where the kind has any."""
    want = split == "val" and rng.random() < 0.5
    for _ in range(100):
        fact = FACTS[kind](rng, lang, kind)
        if held_out(fact.key) == want:
            break
    return fact


# ---------------------------------------------------------------------------------------------------------------------
# Passages of facts, the corpus, its checks and its statistics.


def qa_line(rng: random.Random, fact: Fact, style: str) -> str:
    """A fact as a statement, or as question and answer."""
    end = "." if fact.lang == "en" else "。"
    answer = fact.answer[0].upper() + fact.answer[1:] + end
    if style == "mixed":
        style = rng.choice(("say", "ask", "long"))
    if style == "say":
        return fact.statement
    if style == "labels":
        ask, reply = ("Question: ", "\nAnswer: ") if fact.lang == "en" else ("问：", "\n答：")
        return f"{ask}{fact.question}{reply}{answer}"
    glue = " " if fact.lang == "en" else ""
    if style == "long" and fact.kind not in NO_LONG_ANSWER:
        return fact.question + glue + fact.statement
    return fact.question + glue + answer


def make_facts(rng: random.Random, kind: str, lang: str, split: str) -> Doc:
    """A short passage of facts on one theme, or on a mix of them."""
    theme = rng.choices(("sum", "calendar", "word", "order", "who", "mix"), (32, 13, 13, 16, 8, 18))[0]
    kinds = [name for name in THEMES.get(theme, FACTS) if lang == "en" or name != "abc"]
    facts = [draw_fact(rng, rng.choice(kinds), lang, split) for _ in range(rng.randint(4, 10))]
    style = rng.choice(("say", "ask", "mixed", "mixed", "labels"))
    lines = [expand(rng.choice(FACT_INTROS[lang][theme].split("|")), rng, lang, make_env(rng, lang, "human", split))]
    lines += [qa_line(rng, fact, style) for fact in facts]
    newline = style == "labels" or rng.random() < 0.4
    glue = "\n" if newline else " " if lang == "en" else ""
    return Doc(kind, lang, glue.join(line for line in lines if line), facts)


def make_split(rng: random.Random, split: str, size: int, seen: set[str]) -> list[Doc]:
    """Documents of a split: each kind and language gets its share of the bytes, and no text comes twice."""
    docs = []
    for kind, share in SHARES.items():
        for lang in LANGS:
            room = size * share / len(LANGS)
            while room > 0:
                doc = (make_facts if kind == "facts" else make_text)(rng, kind, lang, split)
                if doc.text not in seen:
                    seen.add(doc.text)
                    docs.append(doc)
                    room -= len(to_line(doc))
    rng.shuffle(docs)
    return docs


def to_line(doc: Doc) -> bytes:
    return (json.dumps({"text": doc.text}, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------------
# Conversations, preferences and prompts.


def say(rng: random.Random, phrases: dict[str, str], lang: str) -> str:
    """One of the phrases of a table."""
    return rng.choice(phrases[lang].split("|")).strip()


def keys_of(fact: Fact) -> list[tuple]:
    """The key of a fact, and of the second gift where its question tells of two."""
    if fact.kind != "who":
        return [fact.key]
    _, verb, _, thing, second = fact.key
    third = [i for i, name in people_in(fact.question, fact.lang).items() if i not in fact.key]
    return [fact.key, *(("who", verb, second, thing, i) for i in third)]


def people_in(text: str, lang: str) -> dict[str, str]:
    """The people a text names: id and name."""
    names = {row[0]: row[0 if lang == "en" else 1] for row in table(PEOPLE)}
    return {i: name for i, name in names.items() if name in text}


def file_of(question: str) -> str:
    """The file that a question belongs to."""
    place = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % 100
    return [name for name, share in CHAT_HASH.items() for _ in range(share)][place]


def draw_asked(rng: random.Random, name: str, lang: str, split: str, used: set[str]) -> Fact:
    """A fact to ask about in a file: held out if for validation, and not asked before while there are new ones."""
    weights = {kind: weight for kind, weight in KIND_WEIGHTS.items() if split == "train" or kind not in TRAIN_ONLY}
    while True:
        kind, again = rng.choices(list(weights), list(weights.values()))[0], None
        for _ in range(150):
            fact = ASKED[kind](rng, lang, kind)
            fine = held_out(fact.key) if split == "val" else not any(map(held_out, keys_of(fact)))
            if kind in ("compare", "most") and rng.random() < 0.6:
                fine = fine and max(map(int, re.findall(r"\d+", fact.question))) <= 20
            if not fine or file_of(fact.question) != name:
                continue
            if fact.question not in used:
                used.add(fact.question)
                return fact
            again = fact
        if again and split == "train" and name != "prompts":
            return again


def answer_of(fact: Fact) -> str:
    """The bare answer, with a or an."""
    return re.sub(r"^a (?=[aeiou])", "an ", fact.answer)


def glue(parts: list[str], lang: str) -> str:
    return (" " if lang == "en" else "").join(parts)


def as_sentence(answer: str, lang: str) -> str:
    return answer[0].upper() + answer[1:] + ("." if lang == "en" else "。")


def courteous(rng: random.Random, answer: str, lang: str, tails: float) -> str:
    """A reply: the answer, and in this share of the replies a courteous tail."""
    parts = [as_sentence(answer, lang)]
    return glue(parts + [say(rng, TAILS, lang)] if rng.random() < tails else parts, lang)


def rude(rng: random.Random, answer: str, lang: str) -> str:
    return say(rng, RUDE, lang).replace("{a}", as_sentence(answer, lang))


def evasive(reply: str) -> bool:
    return any(reply in choices.split("|") for choices in EVASIVE.values())


def rambling(rng: random.Random, answer: str, lang: str) -> str:
    """The answer followed by irrelevant sentences, or in the midst of them."""
    idle = [expand(text.strip(), rng, lang, {}) for text in split_choices(RAMBLES[lang], rng.randint(2, 4), rng)]
    if rng.random() < 0.5:
        return glue([as_sentence(answer, lang), *idle], lang)
    found = say(rng, BURIED, lang).replace("{a}", as_sentence(answer, lang)).replace("{bare}", answer)
    idle.insert(rng.randint(1, len(idle)), found)
    return glue(idle, lang)


def split_choices(source: str, k: int, rng: random.Random) -> list[str]:
    """k of the phrases of a table whose phrases have [a|b] in them."""
    return rng.sample(re.split(r"\|(?![^\[]*\])", source), k)


def near_numbers(rng: random.Random, right: int, question: str) -> list[str]:
    """Numbers that one could take for the right one: a little off, or with a digit changed, lost or from elsewhere."""
    digits, others = str(right), re.findall(r"\d+", question)
    k, given = rng.randrange(len(digits)), rng.choice(others)
    changed = digits[:k] + str(rng.randint(1, 9)) + digits[k + 1 :]
    found = {right + off for off in (-10, -2, -1, 1, 2, 10)}
    found |= {int(changed), int(digits[0] + given[-1]), int(digits[-1])}
    return [str(number) for number in sorted(found) if 0 <= number != right]


def other_opposites(word: str, lang: str) -> list[str]:
    """Words of OPPOSITES that are clearly not the opposite of a word, of which `word` is the right one."""
    col = slice(0, 2) if lang == "en" else slice(2, 4)
    rows = table(OPPOSITES)
    near = {row[0] for row in rows if word in row[col]}
    near |= {head for group in table(ALIKE.replace("\n", " ")) if near & set(group) for head in group}
    return [other for row in rows if row[0] not in near for other in row[col]]


def mistakes(rng: random.Random, fact: Fact) -> list[str]:
    """Plausible answers to the question of a fact, all but the right one of them wrong."""
    kind, lang, question, right = fact.kind, fact.lang, fact.question, answer_of(fact)
    col, comma = (0, ", ") if lang == "en" else (1, "、")
    if right in FLIP:
        return [FLIP[right]]
    if kind == "sort" and comma in right:
        row = right.split(comma)
        swapped = [row[:i] + [row[i + 1], row[i]] + row[i + 2 :] for i in range(len(row) - 1)]
        return [comma.join(some) for some in [*swapped, row[::-1]]]
    if kind in ("compare", "most", "sort"):
        return rng.choice((re.findall(r"\d+", question), near_numbers(rng, int(right), question)))
    if kind == "rank":
        return list(re.search(r", (.+) or (.+)\?" if lang == "en" else r"^(.+)和(.+?)，", question).groups())
    if kind == "class":
        heads = [line.split(":")[0].split()[col].replace("_", " ") for line in CLASSES.split("\n")]
        return [head for head in heads if head in question and head not in right]
    if kind == "who":
        people = list(people_in(question, lang).values())
        things = [] if right in people else rng.sample(table(FOODS + "," + TOYS), 3)
        return people + [f"the {noun(row, lang)}" if lang == "en" else noun(row, lang).text for row in things]
    if kind == "has":
        people = list(people_in(question, lang).values())
        colours = [row[col] for row in table(COLOURS) if row[col] in question]
        things = [noun(row, lang).text for row in table(TOYS)]
        things = ["the " * (lang == "en") + thing for thing in things if thing in question]
        return people if right in people else colours if right in colours else things
    if kind == "place":
        return re.search(r"list (.+)\?" if lang == "en" else "“(.+)”", question)[1].split(comma)
    if kind in ("after", "before", "after_n", "before_n"):
        names = [[row[col] for row in table(source)] for source in (DAYS, MONTHS)]
        return names[0] if right in names[0] else names[1]
    if kind == "opposite":
        return other_opposites(right, lang)
    if kind in ("count", "length"):
        return [str(int(right) + off) for off in (-2, -1, 1, 2) if int(right) + off > 0]
    return near_numbers(rng, int(right), question) + re.findall(r"\d+", question)


def strange(rng: random.Random, fact: Fact) -> list[str]:
    """Answers of the right kind that have nothing to do with the question, as a model gives that guesses."""
    right, col = answer_of(fact), 0 if fact.lang == "en" else 1
    if right.isdigit():
        top = rng.choice((9, 20, 99)) if int(right) < 100 else 999
        return [str(rng.randint(0, top)) for _ in range(3)]
    people = [row[col] for row in table(PEOPLE)]
    if right in people:
        return rng.sample(people, 3)
    things = [noun(row, fact.lang) for row in rng.sample(table(FOODS + "," + TOYS + "," + ANIMALS), 3)]
    if fact.kind in ("has", "who") and col == 0 and right.startswith("the "):
        return [f"the {thing}" for thing in things]
    return [thing.text for thing in things] if fact.kind in ("place", "who") else []


def wrong_answer(rng: random.Random, fact: Fact) -> str:
    """A plausible mistake, or in a third of the cases a strange one."""
    right, found = answer_of(fact), strange(rng, fact) if rng.random() < 0.35 else []
    found = [answer for answer in found if answer != right]
    return rng.choice(found or [answer for answer in mistakes(rng, fact) if answer != right])


def turn(asked: str, replied: str) -> list[dict]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}]


def earlier_turns(rng: random.Random, lang: str, draw: Callable[[], Fact], facts: list[Fact]) -> list[dict]:
    """The turns before the last question: a greeting, one or two questions, or a question and thanks."""
    style = rng.choice(("greeting", "questions", "questions", "thanks"))
    if style == "greeting":
        return turn(say(rng, GREETINGS, lang), say(rng, WELCOMES, lang))
    messages = []
    for _ in range(rng.choice((1, 1, 2)) if style == "questions" else 1):
        facts.append(draw())
        messages += turn(facts[-1].question, courteous(rng, answer_of(facts[-1]), lang, 0.5))
    if style == "thanks":
        messages += turn(say(rng, THANKS, lang), say(rng, NO_PROBLEM, lang))
    return messages


def make_chat(rng: random.Random, name: str, lang: str, split: str, used: set[str]) -> Chat:
    """One record of a file."""

    def draw() -> Fact:
        return draw_asked(rng, name, lang, split, used)

    facts: list[Fact] = []
    multi, system = (0.18, 0.1) if name == "sft" else (0.09, 0.065)
    messages = earlier_turns(rng, lang, draw, facts) if rng.random() < multi else []
    if rng.random() < system:
        messages.insert(0, {"role": "system", "content": say(rng, SYSTEM, lang)})
    fact = draw()
    facts.append(fact)
    answer = answer_of(fact)
    if name == "sft":
        evades = split == "train" and rng.random() < EVASIVE_SHARE
        reply = say(rng, EVASIVE, lang) if evades else courteous(rng, answer, lang, 0.5)
        if split == "train" and not messages:  # another form of record, and a shorter one
            return Chat(lang, {"prompt": fact.question, "completion": reply}, facts)
        record = {"messages": messages + turn(fact.question, reply)}
        return Chat(lang, record if split == "train" else record | {"answer": answer}, facts)
    prompt = [*messages, {"role": "user", "content": fact.question}] if messages else fact.question
    if name == "prompts":
        return Chat(lang, {"prompt": prompt, "answer": answer}, facts)
    category = rng.choices(list(CATEGORIES), list(CATEGORIES.values()))[0]
    if category == "wrong":
        rejected = courteous(rng, wrong_answer(rng, fact), lang, 0.4)  # neither length nor courtesy tells
    elif category == "evasive":
        rejected = say(rng, EVASIVE, lang)
    else:
        rejected = (rude if category == "rude" else rambling)(rng, answer, lang)
    chosen = courteous(rng, answer, lang, 0.4 if category == "wrong" else 0.75)
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return Chat(lang, record if split == "train" else record | {"category": category}, facts, category)


def make_chats(rng: random.Random) -> dict[tuple[str, str], list[Chat]]:
    """All records of the three files for both splits, by split and file; no record comes twice."""
    chats = {}
    for split in ("train", "val"):
        for name, counts in CHAT_COUNTS.items():
            used: set[str] = set()
            found: dict[str, Chat] = {}
            if (split, name) == ("train", "prompts"):  # where the reward model knows best
                for chat in rng.sample(chats["train", "preference"], counts[split]):
                    record = {"prompt": chat.record["prompt"], "answer": answer_of(chat.facts[-1])}
                    found.setdefault(json.dumps(record), Chat(chat.lang, record, chat.facts))
            while len(found) < counts[split] and (split, name) != ("train", "prompts"):
                chat = make_chat(rng, name, LANGS[len(found) % 2], split, used)
                found.setdefault(json.dumps(chat.record), chat)
            chats[split, name] = list(found.values())
            rng.shuffle(chats[split, name])
    return chats


def to_bytes(chats: list[Chat]) -> bytes:
    lines = (json.dumps(chat.record, ensure_ascii=False, separators=(",", ":")) for chat in chats)
    return "".join(line + "\n" for line in lines).encode()


def first_sentence(reply: str) -> str:
    """The part of a reply that answers: up to the first end of a sentence; a point between digits is none."""
    return re.split(r"[。！!？?\n]|(?<!\d)\.|\.(?!\d)", reply.strip())[0].strip().lower()


def check_chat(split: str, name: str, chat: Chat) -> None:
    """Raise an error if a record has facts of the other split, or a reply that should (not) be right is (not)."""
    record, fact = chat.record, chat.facts[-1]
    for known in chat.facts:
        if not held_out(known.key) if split == "val" else any(map(held_out, keys_of(known))):
            raise ValueError(f"a fact of the other split in {split}/{name}: {known.key}")
    right = answer_of(fact).lower()
    good = record.get("chosen") or record.get("completion") or record.get("messages", [{"content": ""}])[-1]["content"]
    if good and first_sentence(good) != right and not (split == "train" and name == "sft" and evasive(good)):
        raise ValueError(f"not the right answer: {record}")
    if chat.category == "wrong" and first_sentence(record["rejected"]) == right:
        raise ValueError(f"a wrong answer is right: {record}")
    if re.search(r"[\[\]{}|~]|  ", " ".join(str(value) for value in record.values() if isinstance(value, str))):
        raise ValueError(f"a template was not filled in: {record}")
    if len(fact.question.split()) > 45:
        raise ValueError(f"a long question: {fact.question}")


def check_chats(chats: dict[tuple[str, str], list[Chat]]) -> None:
    """Raise an error if a record is wrong or comes twice, or if two files share a question."""
    asked: dict[tuple[str, str], set[str]] = {}
    for (split, name), mine in chats.items():
        for chat in mine:
            check_chat(split, name, chat)
        if len({json.dumps(chat.record) for chat in mine}) != len(mine):
            raise ValueError(f"a record of {split}/{name} occurs twice")
        asked[split, name] = {fact.question for chat in mine for fact in chat.facts}
    for one in asked:
        for other in asked:
            if one < other and asked[one] & asked[other] and {one, other} != {
                ("train", "preference"),
                ("train", "prompts"),
            }:
                raise ValueError(f"{one} and {other} share {sorted(asked[one] & asked[other])[:3]}")


def check(train: list[Doc], val: list[Doc], chats: dict[tuple[str, str], list[Chat]]) -> None:
    """Raise an error if the splits overlap, something occurs twice, or training has a held-out fact."""
    check_chats(chats)
    texts = [doc.text for doc in train + val]
    if len(set(texts)) != len(texts):
        raise ValueError("a document occurs twice")
    if {doc.text for doc in train} & {doc.text for doc in val}:
        raise ValueError("a validation document is in the training file")
    leaked = [fact.key for doc in train for fact in doc.facts if held_out(fact.key)]
    if leaked:
        raise ValueError(f"held-out facts in the training file: {leaked[:5]}")
    for doc in train + val:
        if re.search(r"[\[\]{}<>|~](?! ?\d)", doc.text) or "  " in doc.text or "((" in doc.text:
            raise ValueError(f"a template was not filled in: {doc.text}")


def ngram_share(train: list[Doc], val: list[Doc], lang: str) -> float:
    """Share of the n-grams of validation stories (8 words, 12 Chinese characters) that training stories have too."""
    n = 8 if lang == "en" else 12

    def grams(docs: list[Doc]) -> list[tuple]:
        found = []
        for doc in docs:
            if doc.kind == "story" and doc.lang == lang:
                units = re.findall(r"\w+", doc.text.lower()) if lang == "en" else re.findall(r"\w", doc.text)
                found += [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
        return found

    known, asked = set(grams(train)), grams(val)
    return sum(gram in known for gram in asked) / len(asked)


def summary(train: list[Doc], val: list[Doc], chats: dict, sizes: dict[str, int], packed: int) -> None:
    """Print what was made."""
    for split, docs in (("train", train), ("val", val)):
        print(f"{split}: {len(docs)} documents, {sizes[split]} bytes")
    for kind in SHARES:
        for lang in LANGS:
            parts = []
            for split, docs in (("train", train), ("val", val)):
                mine = [len(to_line(doc)) for doc in docs if (doc.kind, doc.lang) == (kind, lang)]
                parts.append(f"{split} {len(mine):5} ({sum(mine):7} bytes)")
            print(f"  {kind:12} {lang}  " + "  ".join(parts))
    everything = "\n".join(doc.text for doc in train)
    print("distinct characters:", len(set(everything)), "of them Chinese:", len(set(re.findall("[一-鿿]", everything))))
    print("distinct English words:", len(set(re.findall("[a-z]+", everything.lower()))))
    for (split, name), mine in chats.items():
        kinds = Counter(chat.facts[-1].kind for chat in mine)
        print(f"{split}/{name}: {len(mine)} records, {len(to_bytes(mine))} bytes;", *(f"{k} {kinds[k]}" for k in kinds))
    print(f"gzip: {packed / sizes['train']:.1%} of the training file")
    for lang in LANGS:
        print(f"story n-grams of val known from train, {lang}: {ngram_share(train, val, lang):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    seen: set[str] = set()
    train = make_split(rng, "train", TRAIN_BYTES, seen)
    val = make_split(rng, "val", VAL_BYTES, seen)
    chats = make_chats(random.Random(args.seed + 1))
    check(train, val, chats)
    sizes, packed = {}, 0
    for split, docs in (("train", train), ("val", val)):
        data = b"".join(to_line(doc) for doc in docs)
        path = args.out / split / "pretrain.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        sizes[split] = len(data)
        packed = packed or len(gzip.compress(data, mtime=0))
    for (split, name), mine in chats.items():
        (args.out / split / f"{name}.jsonl").write_bytes(to_bytes(mine))
    summary(train, val, chats, sizes, packed)


if __name__ == "__main__":
    main()
