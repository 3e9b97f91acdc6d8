"""What a person says to a phone, in Chinese and English, and the answer that is right.

A carrier phrase is put together from an opening, a verb and an ending. Combinations are divided by a hash into
those for training and those held out, and some verbs and whole phrases are kept for the test alone, so that
`part="test"` asks in ways that training never did.
"""

from __future__ import annotations

import functools
import itertools
import random
import zlib
from dataclasses import dataclass

from labkit.common.actions import Action
from labkit.phonetap import words

# opening, verb, ending: the label stands between verb and ending.
_TAP = {
    "zh": (
        ("", "", "请", "帮我", "麻烦", "现在", "请帮我", "你来", "我要", "给我"),
        ("点击", "点一下", "点", "打开", "按一下", "选择", "选", "进入", "轻触", "点开"),
        ("", "", "", "吧", "谢谢", "好吗", "这一项", "看看"),
    ),
    "en": (
        ("", "", "please ", "can you ", "could you ", "now ", "I want to ", "let us ", "you should "),
        ("tap", "open", "click", "press", "select", "choose", "touch", "tap on", "go to", "click on"),
        ("", "", "", " please", " for me", " now", " thanks", " here"),
    ),
}
_TAP_TEST_VERBS = {"zh": ("点选", "按下", "去点"), "en": ("press on", "please choose to open", "go and tap")}
_ICON = {
    "zh": (
        ("点击", "点一下", "点", "按一下", "请点", "帮我点"),
        ("", "那个", "屏幕上的"),
        ("", "", "吧", "谢谢"),
    ),
    "en": (
        ("tap", "click", "press", "touch", "please tap", "can you press"),
        (" the", " that"),
        ("", "", " please"),
    ),
}
_WHAT = {
    "zh": (("我想", "帮我", "我要", "我现在想", "我打算", "能不能"), ("", "", "吧", "谢谢")),
    "en": (
        ("I want to ", "I would like to ", "help me ", "I need to ", "let me ", "can I "),
        ("", "", " please"),
    ),
}
_LAUNCH = {
    "zh": (("", "请", "帮我", "现在"), ("启动", "运行", "切换到"), ("", "应用", "吧")),
    "en": (("", "please ", "now "), ("launch", "start", "switch to"), ("", " app", " please")),
}
_TYPE = {
    "zh": (("", "请", "帮我", "在输入框里"), ("输入", "打字输入", "填写", "写上"), ("", "", "谢谢")),
    "en": (("", "please ", "in the box "), ("type", "enter", "write", "fill in"), ("", "", " please")),
}
_FIXED: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    # name: lang -> (training phrases, held-out phrases)
    "Back": {
        "zh": (("返回", "返回上一页", "后退", "回到上一页", "退回去", "请返回", "回上一级"), ("请返回上一级", "退回上一页")),
        "en": (("go back", "back", "return", "go to the previous page", "please go back", "return to the last page"),
               ("please return", "go back to the last page")),
    },
    "Home": {
        "zh": (("回到桌面", "回主屏幕", "返回桌面", "回到主屏幕", "去桌面", "请回到桌面"), ("请去主屏幕", "回桌面")),
        "en": (("go to the home screen", "go home", "back to the home screen", "show the home screen", "home screen please"),
               ("please go home", "return to the home screen")),
    },
    "Wait": {
        "zh": (("等一下", "稍等", "等一会儿", "先等等", "请等一下", "等待加载"), ("请稍等", "先等一会儿")),
        "en": (("wait", "wait a moment", "please wait", "hold on", "wait a second", "wait for it to load"),
               ("please wait a second", "hold on a moment")),
    },
    "up": {
        "zh": (("向上滑动", "往上滑", "上滑", "往上滑一下", "向上滑", "手指往上滑", "看看下面的内容", "翻到下面", "往下翻"), ("请往上滑", "向上滑一下")),
        "en": (("swipe up", "swipe upwards", "slide up", "scroll down", "show me what is below", "go further down", "please scroll down"),
               ("please swipe up", "scroll further down")),
    },
    "down": {
        "zh": (("向下滑动", "往下滑", "下滑", "往下滑一下", "向下滑", "手指往下滑", "看看上面的内容", "翻到上面", "往上翻"), ("请往下滑", "向下滑一下")),
        "en": (("swipe down", "swipe downwards", "slide down", "scroll up", "show me what is above", "go further up", "please scroll up"),
               ("please swipe down", "scroll further up")),
    },
    "left": {
        "zh": (("向左滑动", "往左滑", "左滑", "往左滑一下", "向左滑", "手指往左滑", "下一屏", "翻到下一屏"), ("请往左滑", "向左滑一下")),
        "en": (("swipe left", "swipe to the left", "next screen", "go to the next screen", "slide left"), ("please swipe left", "slide to the left")),
    },
    "right": {
        "zh": (("向右滑动", "往右滑", "右滑", "往右滑一下", "向右滑", "手指往右滑", "上一屏", "翻到上一屏"), ("请往右滑", "向右滑一下")),
        "en": (("swipe right", "swipe to the right", "previous screen", "go to the previous screen", "slide right"),
               ("please swipe right", "slide to the right")),
    },
    "who": {
        "zh": (("你是谁?", "你是谁", "你叫什么名字?", "介绍一下你自己", "你是什么模型?", "你是谁呀", "请自我介绍", "你能做什么?"),
               ("你是谁啊?", "请介绍一下你自己")),
        "en": (("Who are you?", "who are you", "What is your name?", "Introduce yourself", "What model are you?",
                "What can you do?", "Tell me about yourself"), ("Please introduce yourself", "Who are you")),
    },
    "outside": {
        "zh": (("今天天气怎么样?", "写一首诗", "一加一等于几?", "给我讲个笑话", "中国的首都是哪里?", "你喜欢吃什么?", "帮我写作文",
                "明天股票会涨吗?", "什么是量子力学?", "唱首歌给我听", "怎么做红烧肉?", "推荐一本好书", "世界上最高的山是哪座?",
                "你觉得人生的意义是什么?", "把这段话改得更好", "为什么天是蓝的?", "谁发明了电灯?", "帮我做数学作业"),
               ("给我写一首歌", "什么是人生?", "为什么山是高的?", "谁是世界上最好的歌手?")),
        "en": (("What is the weather today?", "Write a poem", "What is one plus one?", "Tell me a joke",
                "What is the capital of France?", "What do you like to eat?", "Write an essay for me",
                "Will stocks rise tomorrow?", "What is quantum mechanics?", "Sing me a song", "How do I cook noodles?",
                "Recommend a good book", "What is the highest mountain?", "What is the meaning of life?",
                "Why is the sky blue?", "Who invented the light bulb?", "Do my homework", "Explain history to me"),
               ("Write a song for me", "What is the meaning of history?", "Why is the mountain high?", "Tell me a poem")),
    },
    "done": {
        "zh": (("任务已经完成了", "好了可以结束了", "做完了", "结束任务", "可以停了"), ("任务做完了", "好了结束任务")),
        "en": (("the task is done", "that is all", "we are finished", "end the task", "you can stop now"),
               ("the task is finished", "that is all you can stop")),
    },
}  # fmt: skip
_AROUND = {  # what training also puts around requests for an action without a target
    "zh": (("", "", "", "请", "请你", "帮我", "麻烦", "现在", "来"), ("", "", "", "吧", "谢谢", "好吗")),
    "en": (
        ("", "", "", "please ", "can you ", "could you ", "now ", "just ", "I want you to "),
        ("", "", "", " please", " for me", " now", " thanks"),
    ),
}
_SWIPES = {
    "up": ((500, 700), (500, 300)),
    "down": ((500, 300), (500, 700)),
    "left": ((800, 500), (200, 500)),
    "right": ((200, 500), (800, 500)),
}
_REPLIES = {
    "who": {
        "zh": "我是 AutoGLM-Phone 的口袋版教学模型，只会看手机屏幕、听指令并操作手机。",
        "en": "I am the pocket-size teaching sibling of AutoGLM-Phone. I look at a phone screen, listen and act.",
    },
    "outside": {
        "zh": "这超出了我的能力，我只会操作手机屏幕。",
        "en": "That is beyond me. I only operate a phone screen.",
    },
    "done": {"zh": "任务已完成。", "en": "The task is done."},
}
FIXED_TASKS = tuple(_FIXED)


@dataclass(frozen=True)
class Instruction:
    """What is asked, in which language, and the right action (a tap's point is filled in from the screen)."""

    text: str
    lang: str
    task: str  # tap, icon, what, launch, type, or one of FIXED_TASKS
    target: str | None = None  # the label to be tapped, if any
    action: Action | None = None  # None for taps


@functools.cache
def _held_out(slots: tuple[tuple[str, ...], ...]) -> frozenset[tuple[str, ...]]:
    """The eighth of a frame's combinations with the smallest hashes: never in training."""
    combinations = sorted(
        set(itertools.product(*slots)), key=lambda chosen: zlib.crc32("|".join(chosen).encode())
    )
    return frozenset(combinations[: max(1, len(combinations) // 8)])


def _sentence(lang: str, text: str, rng: random.Random) -> str:
    """English begins with a capital and sometimes ends with a full stop; Chinese sometimes too."""
    if lang == "en" and rng.random() < 0.7:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.25:
        text += "。" if lang == "zh" else "."
    return text


def _frame(rng: random.Random, slots: tuple[tuple[str, ...], ...], part: str) -> tuple[str, ...]:
    """One choice per slot; an eighth of the combinations is held out of training for the test."""
    held_out = _held_out(slots)
    if part == "test":
        return rng.choice(sorted(held_out))
    while True:
        chosen = tuple(rng.choice(slot) for slot in slots)
        if chosen not in held_out:
            return chosen


def _space(lang: str, label: str) -> str:
    """The label as it stands after a verb: English words are set off by a space."""
    return f" {label}" if lang == "en" or label[0].isascii() else label


def tap(
    rng: random.Random, label: str, lang: str, part: str = "train", *, spoken: bool = False
) -> Instruction:
    """Asks for an element by the label written on it."""
    opening, verb, ending = _frame(rng, _TAP[lang], part)
    if part == "test" and rng.random() < 0.3:
        verb = rng.choice(_TAP_TEST_VERBS[lang])
    if lang == "zh" and not spoken and rng.random() < 0.15:
        label_text = rng.choice(("“{}”", "「{}」", "【{}】")).format(label)
    elif lang == "en" and not spoken and rng.random() < 0.15:
        label_text = f' "{label}"'
    else:
        label_text = _space(lang, label)
    text = f"{opening}{verb}{label_text}{ending}"
    return Instruction(text if spoken else _sentence(lang, text, rng), lang, "tap", label)


def icon(
    rng: random.Random, name: str, lang: str, part: str = "train", *, spoken: bool = False
) -> Instruction:
    """Asks for a glyph without text by what it shows."""
    verb, article, ending = _frame(rng, _ICON[lang], part)
    called = rng.choice(words.ICONS[name][lang])
    text = f"{verb}{article}{' ' if lang == 'en' else ''}{called}{ending}"
    return Instruction(text if spoken else _sentence(lang, text, rng), lang, "icon", name)


def what(rng: random.Random, label: str, lang: str, part: str = "train") -> Instruction | None:
    """Says what is wanted instead of where to tap; None for labels without a description."""
    described = DESCRIPTIONS[lang].get(label)
    if not described:
        return None
    opening, ending = _frame(rng, _WHAT[lang], part)
    return Instruction(_sentence(lang, opening + rng.choice(described) + ending, rng), lang, "what", label)


def launch(
    rng: random.Random, label: str, lang: str, part: str = "train", *, spoken: bool = False
) -> Instruction:
    """Asks to start an app by name, wherever it is."""
    opening, verb, ending = _frame(rng, _LAUNCH[lang], part)
    text = f"{opening}{verb}{_space(lang, label)}{ending}"
    action = Action("Launch", {"app": label})
    return Instruction(text if spoken else _sentence(lang, text, rng), lang, "launch", None, action)


def type_text(
    rng: random.Random, content: str, lang: str, part: str = "train", *, spoken: bool = False
) -> Instruction:
    """Asks to type `content` into the field that has the focus."""
    opening, verb, ending = _frame(rng, _TYPE[lang], part)
    quoted = not spoken and (ending or rng.random() < 0.3)
    body = (f"“{content}”" if lang == "zh" else f' "{content}"') if quoted else _space(lang, content)
    text = f"{opening}{verb}{body}{ending if quoted else ''}"
    return Instruction(
        text if spoken else _sentence(lang, text, rng), lang, "type", None, Action("Type", {"text": content})
    )


def fixed(
    rng: random.Random, task: str, lang: str, part: str = "train", *, spoken: bool = False
) -> Instruction:
    """A request that needs no target: Back, Home, Wait, a swipe, or a question that is answered by finish."""
    text = rng.choice(_FIXED[task][lang][part == "test"])
    if part == "train" and task not in _REPLIES:
        text = _dressed(rng, task, lang, text)
    if spoken:
        text = text.rstrip("?。.")
    elif task not in ("who", "outside"):
        text = _sentence(lang, text, rng)
    return Instruction(text, lang, task, None, fixed_action(task, lang))


def _dressed(rng: random.Random, task: str, lang: str, text: str) -> str:
    """`text` with an opening and an ending, if that is not one of the phrases that are held out."""
    opening, ending = (rng.choice(choices) for choices in _AROUND[lang])
    whole = f"{opening}{text}{ending}"
    polite = text.startswith(("请", "please")) or text.endswith("please")
    return text if polite or whole in _FIXED[task][lang][1] else whole


def fixed_action(task: str, lang: str) -> Action:
    """The right action for one of FIXED_TASKS."""
    if task in _SWIPES:
        start, end = _SWIPES[task]
        return Action("Swipe", {"start": start, "end": end})
    if task in _REPLIES:
        return Action("finish", {"message": _REPLIES[task][lang]})
    return Action(task, {"duration": "2 seconds"} if task == "Wait" else {})


def describe(thing: str, lang: str, y: float) -> str:
    """One short thought about where the target is; `y` is its centre as a fraction of the screen's height."""
    zone = min(int(y * 3), 2)
    if lang == "zh":
        return f"要点“{thing}”，在屏幕{('上方', '中间', '下方')[zone]}。"
    return f'Tap "{thing}", {("near the top", "in the middle", "near the bottom")[zone]}.'


def heard(text: str, lang: str) -> str:
    """How the thinking begins when the instruction was spoken."""
    return f"听到：{text}。" if lang == "zh" else f"I heard: {text}. "


def think(task: str, lang: str) -> str:
    """One short thought for a request without a target on the screen."""
    zh, en = _THOUGHTS[task if task in _THOUGHTS else "swipe"]
    return zh if lang == "zh" else en


_THOUGHTS = {
    "launch": ("要启动应用。", "Launch the app."),
    "type": ("要输入文字。", "Type the text."),
    "Back": ("要返回上一页。", "Go back."),
    "Home": ("要回到桌面。", "Go to the home screen."),
    "Wait": ("需要等待。", "Wait for the screen."),
    "swipe": ("要滑动屏幕。", "Swipe the screen."),
    "who": ("用户问我是谁。", "The user asks who I am."),
    "outside": ("这不是手机操作。", "This is not about the screen."),
    "done": ("任务结束了。", "The task is over."),
    "name": ("要读出这个位置的文字。", "Read what is there."),
}
DESCRIPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "zh": {zh: description for zh, _, description, _ in words.CONCEPTS if description},
    "en": {en: description for _, en, _, description in words.CONCEPTS if description},
}


def spoken_texts(rng: random.Random, lang: str, part: str, count: int) -> list[Instruction]:
    """Instructions for speech: taps by label and icon, launches, typing and fixed requests, in that order of frequency."""
    drawn = []
    for _ in range(count):
        draw = rng.random()
        if draw < 0.78:
            kind = rng.choice(("app", "app", "setting", "contact", "menu", "chip", "button", "tab"))
            label = words.sample_labels(rng, kind, lang, 1, part)[0]
            drawn.append(tap(rng, label, lang, part, spoken=True))
        elif draw < 0.86:
            drawn.append(icon(rng, rng.choice(tuple(words.ICONS)), lang, part, spoken=True))
        elif draw < 0.90:
            drawn.append(
                launch(rng, words.sample_labels(rng, "app", lang, 1, part)[0], lang, part, spoken=True)
            )
        elif draw < 0.93:
            drawn.append(
                type_text(rng, words.sample_labels(rng, "chip", lang, 1, part)[0], lang, part, spoken=True)
            )
        else:
            drawn.append(fixed(rng, rng.choice(FIXED_TASKS), lang, part, spoken=True))
    return drawn
