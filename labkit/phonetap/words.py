"""The words of PhoneTap's world: what labels are called and how they combine.

Labels are either *concepts* (相机 / Camera: a known name, sometimes with a description of what it is for)
or *compounds* of known parts (飞鱼 + 音乐, Photo + Editor, 王 + 小明). Compounds are divided by a hash of
the label into train, calibration and test, so that at test time a model reads new combinations of known
characters. Concepts occur in every part.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

PARTS = ("train", "calibration", "test")
LANGS = ("zh", "en")

# zh name, en name, what it is for (zh), what it is for (en); used by the `hard` split's indirect requests.
CONCEPTS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("相机", "Camera", ("拍张照片", "拍照"), ("take a picture", "take a photo")),
    ("相册", "Gallery", ("看看以前拍的照片", "翻翻照片"), ("look at my old pictures", "see my photos")),
    ("音乐", "Music", ("听首歌", "放点歌"), ("listen to a song", "play a song")),
    ("视频", "Videos", ("看个短片",), ("watch a clip",)),
    ("电影", "Movies", ("看部大片",), ("watch a film",)),
    ("地图", "Maps", ("找找去车站的路", "看看怎么走"), ("find the way to the station", "get directions")),
    (
        "天气",
        "Weather",
        ("看看明天下不下雨", "查查气温"),
        ("see if it rains tomorrow", "check the temperature"),
    ),
    ("日历", "Calendar", ("看看今天几号", "安排一个会议"), ("see what day it is", "plan a meeting")),
    ("时钟", "Clock", ("定个闹钟", "看看几点了"), ("set an alarm", "see what time it is")),
    ("计算器", "Calculator", ("算一道题", "算算账"), ("add up some numbers", "do some sums")),
    ("邮件", "Mail", ("写封信", "收信"), ("send a letter", "write a letter")),
    ("短信", "Messages", ("发条消息", "发个信息"), ("text a friend", "write to a friend")),
    ("电话", "Phone", ("打给妈妈", "拨个号码"), ("call my mother", "dial a number")),
    ("联系人", "Contacts", ("找一个朋友的号码",), ("look up a friend",)),
    ("浏览器", "Browser", ("上网看看", "打开一个网页"), ("go online", "visit a web page")),
    ("笔记", "Notes", ("记下一个想法", "写点东西"), ("write down an idea", "jot something down")),
    ("录音机", "Recorder", ("录一段声音",), ("record my voice",)),
    ("文件", "Files", ("找找下载的文档",), ("find a document",)),
    ("设置", "Settings", ("改一下手机的配置",), ("change how my phone works",)),
    ("应用商店", "App Store", ("装个新软件", "下个新软件"), ("install a new program", "get a new program")),
    ("微信", "WeChat", (), ()),
    ("微博", "Weibo", (), ()),
    ("支付宝", "Alipay", ("付钱", "交水电费"), ("pay a bill",)),
    ("淘宝", "Taobao", ("买件衣服",), ("buy some clothes",)),
    ("钱包", "Wallet", ("看看银行卡",), ("see my bank cards",)),
    ("健康", "Health", ("看看今天走了多少步",), ("see how far I walked",)),
    ("新闻", "News", ("看看今天的大事",), ("read what happened today",)),
    ("图书", "Books", ("读本小说",), ("read a novel",)),
    ("游戏", "Games", ("玩一会儿",), ("play for a while",)),
    ("翻译", "Translate", ("把这句话变成外语",), ("turn this into another language",)),
    ("打车", "Taxi", ("叫辆车回家",), ("get a ride home",)),
    ("外卖", "Food", ("点份午饭",), ("order lunch",)),
    ("酒店", "Hotels", ("订个房间",), ("book a room",)),
    ("火车票", "Trains", ("买张车票",), ("buy a rail ticket",)),
    ("手电筒", "Flashlight", ("照个亮",), ("light up the dark",)),
    ("指南针", "Compass", ("看看哪边是北",), ("see which way is north",)),
    ("无线网络", "Wi-Fi", ("连上网",), ("get on the net",)),
    ("蓝牙", "Bluetooth", ("连上耳机",), ("pair my headphones",)),
    ("移动网络", "Mobile Data", (), ()),
    ("飞行模式", "Airplane Mode", ("上飞机前断开信号",), ("turn off all signals for my flight",)),
    ("个人热点", "Hotspot", ("把网分享给电脑",), ("share my connection",)),
    ("显示", "Display", ("把屏幕调亮一点",), ("make the screen brighter",)),
    ("声音", "Sound", ("把音量调小",), ("make it quieter",)),
    ("通知", "Notifications", ("少收一点提醒",), ("get fewer alerts",)),
    ("电池", "Battery", ("看看还剩多少电",), ("see how much charge is left",)),
    ("存储", "Storage", ("看看还剩多少空间",), ("see how much space is left",)),
    ("隐私", "Privacy", (), ()),
    ("安全", "Security", (), ()),
    ("账号", "Accounts", (), ()),
    ("语言", "Language", ("把系统改成英文",), ("switch to Chinese",)),
    ("壁纸", "Wallpaper", ("换一张背景图",), ("change the background",)),
    ("字体", "Fonts", ("把字变大一点",), ("make the letters bigger",)),
    ("键盘", "Keyboard", (), ()),
    ("定位", "Location", (), ()),
    ("密码", "Passwords", ("看看我的登录口令",), ("see my saved logins",)),
    ("锁屏", "Lock Screen", (), ()),
    ("勿扰模式", "Do Not Disturb", ("睡觉时不要吵我",), ("keep it silent while I sleep",)),
    ("备份", "Backup", ("把资料存一份",), ("keep a copy of my data",)),
    ("系统更新", "System Update", ("升级到新版本",), ("get the newest version",)),
    ("关于手机", "About Phone", ("看看这是什么型号",), ("see which model this is",)),
    ("设备", "Devices", (), ()),
    ("主题", "Themes", (), ()),
    ("辅助功能", "Accessibility", (), ()),
    ("打印", "Printing", (), ()),
    ("投屏", "Cast", ("把画面放到电视上",), ("show it on the television",)),
)

BUTTONS = (
    ("确定", "OK"), ("取消", "Cancel"), ("保存", "Save"), ("删除", "Delete"), ("提交", "Submit"),
    ("下一步", "Next"), ("上一步", "Previous"), ("完成", "Done"), ("跳过", "Skip"), ("允许", "Allow"),
    ("拒绝", "Deny"), ("同意", "Agree"), ("稍后", "Later"), ("发送", "Send"), ("登录", "Log In"),
    ("注册", "Sign Up"), ("关闭", "Close"), ("重试", "Retry"), ("继续", "Continue"), ("立即更新", "Update Now"),
    ("加入购物车", "Add to Cart"), ("立即购买", "Buy Now"), ("收藏", "Favorite"), ("关注", "Follow"),
    ("编辑", "Edit"), ("分享", "Share"), ("复制", "Copy"), ("回复", "Reply"), ("转发", "Forward"),
    ("不再提醒", "Do Not Remind"), ("知道了", "Got It"), ("清空", "Clear"), ("全选", "Select All"),
    ("扫一扫", "Scan"), ("付款", "Pay"), ("预订", "Book"), ("导航", "Navigate"), ("播放", "Play"),
)  # fmt: skip
TABS = (
    ("首页", "Home"), ("发现", "Discover"), ("消息", "Inbox"), ("我的", "Me"), ("推荐", "For You"),
    ("分类", "Categories"), ("购物车", "Cart"), ("附近", "Nearby"), ("动态", "Feed"), ("订单", "Orders"),
    ("会员", "Members"), ("历史", "History"), ("热门", "Popular"), ("直播", "Live"), ("下载", "Downloads"),
)  # fmt: skip

ZH_APP = (
    "天天 快乐 小白 飞鱼 星星 云上 绿洲 蓝天 火山 大象 蜜蜂 熊猫 月光 海豚 青鸟 红豆 果壳 石头 木棉 彩虹 百合 千里 万家 金牛".split(),
    "音乐 视频 地图 日历 相机 笔记 阅读 购物 外卖 打车 新闻 理财 课堂 健身 旅行 翻译 直播 菜谱 天气 浏览 邮箱 钱包 电台 医生".split(),
)  # fmt: skip
EN_APP = (
    (
        "Photo Music Video Cloud Smart Quick Daily Happy Magic Super Pocket Green Blue Red Star Moon Sun City Family "
        "River Panda Tiger Pixel Paper Silver Lucky Fresh Royal"
    ).split(),
    (
        "Editor Player Maps Notes Mail Camera Store Reader Wallet Chat Fitness Recipes Weather Radio Books Games News "
        "Travel Taxi Bank Scanner Clock Draw Tasks Garden Kitchen"
    ).split(),
)
ZH_SETTING = (
    (
        "网络 显示 声音 通知 电池 存储 隐私 账号 语言 字体 壁纸 密码 指纹 人脸 定位 流量 热点 桌面 锁屏 系统 应用 备份 键盘 "
        "时间 日期 地区 铃声 振动 亮度 护眼 省电 云端 家庭 儿童 运动 健康 支付 打印 投屏 相册"
    ).split(),
    "设置 管理 中心 助手 模式 选项 记录 权限 服务 工具 清理 共享 同步 提醒 保护 更新".split(),
)
EN_SETTING = (
    (
        "Network Display Sound Battery Storage Privacy Account Language Font Screen System App Backup Keyboard Date "
        "Region Ringtone Brightness Home Health Payment Printer Location Password Theme Children Sleep Power Camera"
    ).split(),
    (
        "Settings Manager Center Mode Options History Access Services Tools Sharing Sync Usage Lock Info Alerts Rules"
    ).split(),
)
ZH_NAME = (
    list("王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕"),
    (
        "小明 小红 小丽 小军 建国 国强 志强 文静 雪梅 春花 秋月 冬冬 晓东 晓燕 海波 海燕 丽华 玉兰 思远 思雨 子涵 浩然 "
        "天宇 美玲 婷婷 佳怡 欣欣 俊杰 明亮 永红 立新 伟 芳 娜 静 敏 强 磊 洋 勇 艳 杰 涛 超 平 刚"
    ).split(),
)
EN_NAME = (
    (
        "Alice Bob Carol David Emma Frank Grace Henry Irene Jack Kate Leo Mary Nick Olivia Paul Rachel Sam Tina Victor "
        "Wendy Peter Linda James Susan Tom Anna George Helen Oscar Nora Felix Julia Martin Sarah Daniel"
    ).split(),
    (
        "Smith Jones Brown Taylor Wilson Davis Clark Lewis Walker Hall Young King Wright Hill Scott Green Adams Baker "
        "Nelson Carter Mitchell Turner Parker Collins Morgan Cooper Reed Bailey Bell Ward Brooks Gray Price Wood"
    ).split(),
)
ZH_TOPIC = (
    "红烧 清蒸 家常 四川 广东 北京 上海 春季 夏天 冬天 儿童 老人 学生 男士 女士 新款 二手 进口 手工 智能 便宜 高级".split(),
    "牛肉 豆腐 鸡汤 面条 火锅 水果 茶叶 咖啡 衣服 鞋子 手表 耳机 电脑 书包 玩具 家具 台灯 雨伞 帽子 自行车 旅馆 公园".split(),
)
EN_TOPIC = (
    (
        "cheap local fresh used new small large winter summer kids school office garden kitchen leather cotton smart "
        "best nearby easy classic modern"
    ).split(),
    (
        "noodles coffee pizza salad shoes jackets watches phones laptops bags toys chairs lamps umbrellas hats bikes "
        "hotels parks museums recipes flowers tickets"
    ).split(),
)
COMPOUNDS: dict[tuple[str, str], tuple[Sequence[str], Sequence[str]]] = {
    ("app", "zh"): ZH_APP,
    ("app", "en"): EN_APP,
    ("setting", "zh"): ZH_SETTING,
    ("setting", "en"): EN_SETTING,
    ("contact", "zh"): ZH_NAME,
    ("contact", "en"): EN_NAME,
    ("menu", "zh"): ZH_SETTING,
    ("menu", "en"): EN_SETTING,
    ("chip", "zh"): ZH_TOPIC,
    ("chip", "en"): EN_TOPIC,
}

# Names of glyphs that carry no text on the screen; keys are labkit.phonetap.drawing.icons.ICON_NAMES.
ICONS: dict[str, dict[str, tuple[str, ...]]] = {
    "back": {"zh": ("返回箭头", "左箭头"), "en": ("back arrow", "left arrow")},
    "close": {"zh": ("叉号", "关闭图标"), "en": ("cross", "close icon")},
    "search": {"zh": ("放大镜", "搜索图标"), "en": ("magnifier", "search icon")},
    "settings": {"zh": ("齿轮", "设置图标"), "en": ("gear", "gear icon")},
    "menu": {"zh": ("三条横线", "菜单图标"), "en": ("three lines", "menu icon")},
    "more": {"zh": ("三个点", "更多图标"), "en": ("three dots", "more icon")},
    "add": {"zh": ("加号", "添加图标"), "en": ("plus sign", "plus icon")},
    "heart": {"zh": ("爱心", "心形图标"), "en": ("heart", "heart icon")},
    "star": {"zh": ("五角星", "星形图标"), "en": ("star", "star icon")},
    "bell": {"zh": ("铃铛", "铃铛图标"), "en": ("bell", "bell icon")},
    "camera": {"zh": ("相机图标", "照相机图标"), "en": ("camera icon", "camera symbol")},
    "phone": {"zh": ("电话图标", "听筒"), "en": ("phone icon", "handset")},
    "mail": {"zh": ("信封", "信封图标"), "en": ("envelope", "envelope icon")},
    "home": {"zh": ("小房子", "房子图标"), "en": ("house", "house icon")},
    "user": {"zh": ("头像图标", "人像图标"), "en": ("person icon", "profile icon")},
    "trash": {"zh": ("垃圾桶", "垃圾桶图标"), "en": ("trash can", "bin icon")},
    "edit": {"zh": ("铅笔", "铅笔图标"), "en": ("pencil", "pencil icon")},
    "share": {"zh": ("分享图标", "分享符号"), "en": ("share icon", "share symbol")},
    "download": {"zh": ("下载图标", "向下箭头"), "en": ("download icon", "down arrow")},
    "microphone": {"zh": ("麦克风", "话筒图标"), "en": ("microphone", "microphone icon")},
    "lock": {"zh": ("小锁", "锁形图标"), "en": ("padlock", "lock icon")},
    "play": {"zh": ("播放图标", "三角形"), "en": ("play icon", "triangle")},
    "pause": {"zh": ("暂停图标", "两条竖线"), "en": ("pause icon", "two bars")},
    "cart": {"zh": ("购物车图标", "小推车"), "en": ("cart icon", "shopping cart icon")},
    "clock": {"zh": ("钟表图标", "表盘"), "en": ("clock icon", "clock face")},
    "calendar": {"zh": ("日历图标", "日历符号"), "en": ("calendar icon", "calendar symbol")},
    "location": {"zh": ("定位图标", "地标图钉"), "en": ("map pin", "location icon")},
    "cloud": {"zh": ("云朵", "云朵图标"), "en": ("cloud symbol", "cloud icon")},
    "sun": {"zh": ("太阳", "太阳图标"), "en": ("sun symbol", "sun icon")},
    "moon": {"zh": ("月亮", "月亮图标"), "en": ("crescent", "moon icon")},
    "wifi": {"zh": ("无线信号图标", "扇形信号"), "en": ("wireless icon", "wireless waves")},
    "bookmark": {"zh": ("书签", "书签图标"), "en": ("bookmark", "bookmark icon")},
    "send": {"zh": ("纸飞机", "发送图标"), "en": ("paper plane", "send icon")},
    "image": {"zh": ("图片图标", "风景图标"), "en": ("picture icon", "image icon")},
    "check": {"zh": ("对勾", "打勾图标"), "en": ("check mark", "tick icon")},
    "refresh": {"zh": ("刷新图标", "循环箭头"), "en": ("refresh icon", "circular arrow")},
    "volume": {"zh": ("喇叭", "音量图标"), "en": ("loudspeaker", "volume icon")},
    "keyboard": {"zh": ("键盘图标", "键盘符号"), "en": ("keyboard icon", "keyboard symbol")},
    "folder": {"zh": ("文件夹图标", "文件夹符号"), "en": ("folder icon", "folder symbol")},
    "globe": {"zh": ("地球", "地球图标"), "en": ("globe", "globe icon")},
}

_LOOKALIKES = (
    "设置 设备|相机 相册|音乐 音量 声音|微信 微博|电话 电影 电池|邮件 文件|地图 地址|视频 视力|短信 微信|日历 日期|天气 天天|通知 通话|"
    "密码 号码|时钟 闹钟|游戏 游泳|健康 健身|支付宝 淘宝|显示 提示|隐私 隐藏|打车 火车票|新闻 新款|外卖 外设|完成 完善|提交 提醒",
    "Mail Maps|Music Movies|Clock Cloud Close|Notes News Next|Phone Photo|Messages Members|Books Book|Files Films|"
    "Health Help|Wallet Wallpaper|Games Garden|Display Discover|Sound Send|Battery Backup|Store Storage Story|"
    "Contacts Continue Control|Camera Calendar Calculator|Privacy Previous|Save Share Safe|Fonts Food|Cast Cart Card",
)  # fmt: skip
LOOKALIKES: dict[str, tuple[str, ...]] = {}
for _group in (group.split() for text in _LOOKALIKES for group in text.split("|")):
    for _word in _group:
        LOOKALIKES[_word] = (*LOOKALIKES.get(_word, ()), *(other for other in _group if other != _word))

_FILLER = {
    "zh": "今天我们在这里看到很多有用的内容请稍等一下更多信息可以向下查看感谢您的使用如果需要帮助就联系客服人员处理",
    "en": (
        "you can find more about this below and we hope it helps please read on for what is new in this version "
        "thank you for using our service"
    ).split(),
}
TITLES = {
    "zh": ("提示", "系统提示", "温馨提示", "更多操作", "请选择", "发现新版本", "权限请求", "确认操作"),
    "en": (
        "Notice",
        "Please Choose",
        "More Actions",
        "New Version",
        "Permission",
        "Are You Sure?",
        "Options",
    ),
}


def part_of(label: str) -> str:
    """The part a compound label belongs to: a tenth each to test and calibration, by a hash of its letters."""
    bucket = zlib.crc32(label.lower().encode()) % 10
    return "test" if bucket == 0 else "calibration" if bucket == 1 else "train"


def join(lang: str, first: str, second: str) -> str:
    """Two parts of a compound as one label: joined in Chinese, with a space in English."""
    return first + second if lang == "zh" else f"{first} {second}"


def compound(rng: random.Random, kind: str, lang: str, part: str) -> str:
    """A random compound label of a kind that belongs to `part`."""
    firsts, seconds = COMPOUNDS[kind, lang]
    while True:
        label = join(lang, rng.choice(firsts), rng.choice(seconds))
        if part_of(label) == part:
            return label


def concepts(kind: str, lang: str) -> list[str]:
    """Known labels of a kind that occur in every part of the data."""
    column = LANGS.index(lang)
    if kind == "button":
        return [pair[column] for pair in BUTTONS]
    if kind == "tab":
        return [pair[column] for pair in TABS]
    if kind in ("contact", "chip"):
        return []
    names = [entry[column] for entry in CONCEPTS]
    return names[:36] if kind == "app" else names[36:] if kind == "setting" else names


def sample_labels(rng: random.Random, kind: str, lang: str, count: int, part: str = "train") -> list[str]:
    """`count` distinct labels suited to a kind of element.

    Kinds: app, setting, contact, menu, button, chip, tab. Distinct also ignoring case. A button or tab list
    has a limited stock; asking for more than it holds raises ValueError.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}; known: {', '.join(PARTS)}")
    listed, chosen, seen = concepts(kind, lang), [], set()
    if (kind, lang) not in COMPOUNDS and count > len(listed):
        raise ValueError(f"only {len(listed)} labels of kind {kind!r} exist; {count} asked for")
    while len(chosen) < count:
        from_listed = listed and ((kind, lang) not in COMPOUNDS or rng.random() < 0.4)
        label = rng.choice(listed) if from_listed else compound(rng, kind, lang, part)
        if label.lower() not in seen:
            seen.add(label.lower())
            chosen.append(label)
    return chosen


def lookalikes(rng: random.Random, label: str, lang: str, part: str = "train") -> list[str]:
    """Labels easily mistaken for `label`: listed neighbours, and compounds that share one of its two parts."""
    alike = list(LOOKALIKES.get(label, ()))
    for kind in ("app", "setting", "contact", "chip"):
        firsts, seconds = COMPOUNDS[kind, lang]
        for first in firsts:
            rest = label[len(first) :].strip()
            if label.startswith(first) and rest in seconds:
                same_first = [join(lang, first, other) for other in seconds if other != rest]
                same_second = [join(lang, other, rest) for other in firsts if other != first]
                pool = [x for x in same_first + same_second if part_of(x) == part]
                alike += rng.sample(pool, min(4, len(pool)))
    return list(dict.fromkeys(alike))


def title(rng: random.Random, lang: str) -> str:
    """A heading that is not a tap target."""
    return rng.choice(TITLES[lang])


def filler(rng: random.Random, lang: str, length: int) -> str:
    """About `length` characters of running text that is not a tap target."""
    source = _FILLER[lang]
    if lang == "zh":
        start = rng.randrange(len(source))
        return (source * (2 + length // len(source)))[start : start + length]
    words: list[str] = []
    while len(" ".join(words)) < length:
        words.append(rng.choice(source))
    return " ".join(words)[:length].strip().capitalize()
