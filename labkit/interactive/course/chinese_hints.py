"""The course's hints in Chinese: English sentence, with {} for the parts that vary -> translation."""

import re
from functools import cache

HINTS: dict[str, str] = {
    "{} Replace the three dots, and run the cell again.": "{} 把三个点换掉,再运行这个单元格。",
    "Hint {} of {}: {}": "提示 {}/{}:{}",
    "The lab refuses this: {}.": "实验室拒绝了它:{}。",
    "A number is asked for, in {}; this is of the type {}.": "要的是一个数,单位 {};这是 {} 类型。",
    "A number is asked for; this is of the type {}.": "要的是一个数;这是 {} 类型。",
    "This is many numbers; one is asked for.": "这是许多个数;要的是一个。",
    # 00
    "Divide the bytes of fp32's weights by those of int4's; both are in the table's column Weights.":
        "用 fp32 权重的字节除以 int4 的;两者都在表的 Weights 一列。",
    "That is int4's share of fp32. Turn the fraction round: how many times smaller is it?":
        "这是 int4 占 fp32 的比例。把分数倒过来:小多少倍?",
    "Eight is what 32 bits against 4 promise. Divide the two numbers in the column Weights.":
        "八倍是 32 位对 4 位的许诺。请用 Weights 一列的两个数相除。",
    "That is the share which is saved. Divide fp32's bytes by int4's instead.":
        "这是省下的比例。请改用 fp32 的字节除以 int4 的。",
    "Give the screen and the model's answer together, as (mine, answer).": "请一起给出屏幕和模型的回答:(mine, answer)。",
    "There is no 相机 on this screen (but {} …). must_have takes a list of labels.":
        "这张屏幕上没有 相机(有的是 {} ……)。must_have 接受一个标签列表。",
    "The answer taps nothing. Does the message hold the picture of this screen and a request?":
        "这个回答什么也没点。消息里有这张屏幕的图片和一个要求吗?",
    "The question is asked well, and the tap misses 相机. Ask about *this* screen's picture; if you do, it is the "
    "model's mistake: another seed draws another screen.":
        "问得没错,但没有点中 相机。请用*这张*屏幕的图片提问;如果已经是,那就是模型的错:换一个种子画另一张屏幕。",
    # 01
    "Give the plan, or the list of its rules.": "请给出方案,或它的规则列表。",
    "{} is a part of {}: it gets {}, not {}.": "{} 属于 {}:它得到 {},而不是 {}。",
    "That is one screenshot. Ten are asked for.": "这是一张截图。问的是十张。",
    "That is the number of tokens. Each of them takes kv_cache_bytes_per_token() bytes.":
        "这是 token 的个数。每个占 kv_cache_bytes_per_token() 字节。",
    "The product is right; the unit is not: 1 MB is 1,000,000 bytes.": "乘积对了,单位不对:1 MB 是 1,000,000 字节。",
    "That is without the limit of pixels: image_tokens takes it as a third number.":
        "这没有算像素上限:image_tokens 的第三个数就是它。",
    "Ten times the tokens of a screenshot, times bytes of KV cache a token, divided by a million.":
        "一张截图的 token 乘以十,乘以每 token 的 KV 缓存字节,除以一百万。",
    # 02
    "The weight with the largest magnitude must get the code 7: scale = max|w| / 7.":
        "绝对值最大的权重必须得到码 7:scale = max|w| / 7。",
    "Eight codes lie below zero, but the symmetric range goes from -7 to 7: -8 is not used.":
        "零以下有八个码,但对称的范围是 -7 到 7:-8 不用。",
    "That is the asymmetric scale: the range cut into 15 steps. Symmetric looks at max|w| only.":
        "这是非对称的 scale:把范围切成 15 步。对称只看 max|w|。",
    "The largest weight is not the one that is farthest from zero: take magnitudes, abs(w).":
        "最大的权重不是离零最远的那个:要取绝对值 abs(w)。",
    "The sixteen codes are shared by both signs: how many steps lie on one side of zero?":
        "十六个码由正负两边共用:零的一边有几步?",
    "Give the function itself, without calling it: course.check('02-b', round_trip).":
        "请给出函数本身,不要调用它:course.check('02-b', round_trip)。",
    "The function returns nothing: does it end with return?": "函数什么也没返回:末尾有 return 吗?",
    "A tensor of 64 weights should come back; this is {}.": "应当返回 64 个权重的张量;这是 {}。",
    "The weights come back unchanged: nothing was rounded. torch.round, or .round(), does it.":
        "权重原样返回:什么也没有舍入。用 torch.round 或 .round()。",
    "These are the codes. To be weights again they must be multiplied by the scale.":
        "这些是码。要变回权重,必须乘以 scale。",
    "The codes are cut off, not rounded: 2.9 should become 3. Use .round(), not .int().":
        "码是截断的,不是舍入的:2.9 应当变成 3。用 .round(),不要用 .int()。",
    "With 4 bits it is right, with {} it is not: the 7 depends on num_bits.":
        "4 位时对了,{} 位时不对:那个 7 取决于 num_bits。",
    "Some weight is off by {} steps. Three lines: scale = max|w| / (2 ** (num_bits - 1) - 1), codes = row / scale "
    "rounded, and codes times scale.":
        "有权重差了 {} 步。三行:scale = max|w| / (2 ** (num_bits - 1) - 1),codes = row / scale 再舍入,然后 codes 乘 scale。",
    "round_trip(row, {}) raises {}: {}. It is given a tensor of 64 weights and a number of bits.":
        "round_trip(row, {}) 引发了 {}:{}。它得到的是 64 个权重的张量和位数。",
    "4 bits for the code, and a 32nd of what the group stores: 16 bits of scale, 16 of zero point.":
        "码 4 位,再加上一组所存的三十二分之一:16 位 scale 和 16 位 zero point。",
    "That is one 16-bit number for 32 weights. Each group stores two: a scale and a zero point.":
        "这是 32 个权重一个 16 位数。每组存两个:scale 和 zero point。",
    "The 32 bits of scale and zero point are shared by the 32 weights of a group.":
        "scale 和 zero point 的 32 位由一组的 32 个权重分摊。",
    "Give two numbers, (num_bits, group_size).": "请给出两个数 (num_bits, group_size)。",
    "num_bits is one of 2, 3, 4, 8 and group_size one of 32, 64, 128.":
        "num_bits 是 2、3、4、8 之一,group_size 是 32、64、128 之一。",
    "{} bits in groups of {} keep {} dB, and {} are wanted: smaller groups, or more bits?":
        "{} 位、每组 {} 保住 {} dB,要的是 {}:用更小的组,还是更多的位?",
    "{} dB: good enough, but it takes {} bits a weight; {} would do. Before you take more bits, try smaller groups.":
        "{} dB:够好了,但每个权重占 {} 位;{} 位就够。在增加位数之前,试试更小的组。",
    # 03
    "That is a whole step. A value is rounded to the nearest code: from half a step on it becomes 1.":
        "这是一整步。值舍入到最近的码:从半步起就成为 1。",
    "255 steps would cover both signs together. Symmetric: 127 of them lie between 0 and 254.":
        "255 步是正负两边合起来的。对称时,0 到 254 之间有 127 步。",
    "One step is the largest value over 127. What is smaller than half of it rounds to 0.":
        "一步是最大值除以 127。小于它一半的都舍入为 0。",
    "Give three whole numbers, one code for each weight, as (0, 0, 0).": "请给出三个整数,每个权重一个码,如 (0, 0, 0)。",
    "Codes are whole numbers: that is what rounding is about.": "码是整数:舍入就是这个意思。",
    "With all inputs 1 the output should be {}; these codes give {}. Each is rounded to its nearest; together they "
    "are off.": "输入都是 1 时,输出应是 {};这些码给出 {}。各自舍入到了最近,合起来却偏了。",
    "With all inputs 1 the output should be {}; these codes give {}.": "输入都是 1 时,输出应是 {};这些码给出 {}。",
    "The output is as near as can be, but by codes far from their weights: 0 and 1 are enough.":
        "输出已经尽可能接近,但这些码离各自的权重太远:0 和 1 就够了。",
    # 04
    "Give the list of rules, or a plan.": "请给出规则列表,或一个方案。",
    "The vision encoder gets {}; it should keep 8 bits.": "视觉编码器得到 {};它应当保持 8 位。",
    "{} MB: too many. The largest part is {} with {} MB.": "{} MB:太多了。最大的部分是 {},占 {} MB。",
    "Give the bytes of A, B and C, as (4, 4, 2).": "请给出 A、B、C 的字节,如 (4, 4, 2)。",
    "That takes {} bytes; {} are there.": "这要 {} 字节;只有 {}。",
    "A loss of {}; {} can be had. C gains most for each byte, but then A cannot be afforded.":
        "损失 {};可以做到 {}。C 每字节赚得最多,但那样就买不起 A 了。",
    "A loss of {}; {} can be had.": "损失 {};可以做到 {}。",
    "{} takes {} bytes, not {}.": "{} 占 {} 字节,不是 {}。",
    # 05
    "Right, in seconds. In milliseconds it is a thousand times that.": "以秒计是对的。以毫秒计要乘一千。",
    "That is how many tokens fit into a time. Bytes over bytes a second gives the time of one.":
        "这是一段时间里能有多少 token。字节除以每秒字节,才是一个的时间。",
    "Every weight is read once a token: bytes of the weights / bytes a second, times 1,000.":
        "每个 token 把所有权重读一遍:权重的字节 / 每秒字节,乘 1,000。",
    "A factor of 2 is off: a weight has 2 bytes, and each row does 2 operations with it.":
        "差了 2 倍:一个权重 2 字节,每行对它做 2 次运算。",
    "With n rows each weight (2 bytes) does 2n operations, n a byte. At which n does that reach FLOP/s over bytes/s?":
        "n 行时每个权重(2 字节)做 2n 次运算,每字节 n 次。n 是多少时达到 FLOP/s 除以 bytes/s?",
    "That is one conversation. Each of the eight has a cache of its own.": "这是一个对话。八个各有自己的缓存。",
    "The product is right; the unit is not: 1 GB is 1,000,000,000 bytes.":
        "乘积对了,单位不对:1 GB 是 1,000,000,000 字节。",
    "Conversations, times tokens, times bytes a token (40,960 in bf16), divided by 1e9.":
        "对话数乘 token 数乘每 token 字节(bf16 是 40,960),除以 1e9。",
    # 06
    "Losses do not add up: a task that has failed already cannot fail again. Multiply what is right.":
        "损失不能相加:已经失败的任务不会再失败一次。把正确的相乘。",
    "That is the share which fails. The share that is done is asked for.": "这是失败的比例。问的是完成的比例。",
    "Every step must be right: the first, and the second, and so on, eight times.":
        "每一步都必须对:第一步、第二步……一共八次。",
    # 07
    "A message is a dictionary with role and content.": "消息是一个字典,有 role 和 content。",
    "You are speaking: the role is user, not {}.": "是你在说话:role 是 user,不是 {}。",
    "With a picture, content is a list of parts, each a dictionary with its type.":
        "带图片时,content 是一个列表,每个部分是一个带 type 的字典。",
    "That part is for an engine in this process. A service takes image_url with a data URL.":
        "那种部分是给本进程里的引擎的。服务接受带 data URL 的 image_url。",
    'An image_url part is {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}.':
        'image_url 部分是 {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}。',
    "There is no part of the type {}; there are {}.": "没有类型为 {} 的部分;有的是 {}。",
    "Nearly: {}.": "差一点:{}。",
    # 08
    "Usual group sizes are 32, 64, 128 and 256.": "常用的组大小是 32、64、128 和 256。",
    "Each GPU holds {} of the {} columns: {} groups of {}.": "每块 GPU 有 {} 列(共 {} 列):{} 组,每组 {}。",
    "{} divides evenly; there is a larger group size that does, too.": "{} 能整除;还有更大的组大小也能。",
    "The candidates are {}: give the name of one.": "候选是 {}:请给出其中一个的名字。",
    "{} needs {} GB with a full cache: of {} GB too little is left.": "{} 连同满的缓存要 {} GB:{} GB 中剩得太少。",
    "nf4 fits ({} GB). Another plan fits as well, and takes a few more bits a weight.":
        "nf4 放得下({} GB)。另一个方案也放得下,而且每个权重多一点位。",
}  # fmt: skip


def translated(message: str) -> str:
    """A sentence of the course in Chinese; an unknown sentence stays as it is."""
    for pattern, chinese in _patterns():
        if match := pattern.fullmatch(message):
            pieces, rest = iter(match.groups()), chinese
            return "".join(
                part if number == 0 else next(pieces) + part for number, part in enumerate(rest.split("{}"))
            )
    return message


@cache
def _patterns() -> list[tuple[re.Pattern, str]]:
    """English sentences as patterns, the longest first."""
    sentences = sorted(HINTS.items(), key=lambda item: -len(item[0]))
    return [
        (re.compile("(.+?)".join(map(re.escape, english.split("{}"))), re.S), zh) for english, zh in sentences
    ]
