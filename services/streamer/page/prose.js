// Model text to DOM, safely and reversibly: text only ever becomes text nodes, and `textContent` of the result is
// exactly the model's text, because the marks that are not shown (fences, `**`, blank lines) are hidden, not dropped.

const FENCE = /^ {0,3}(```+|~~~+)([^`\n]*)\n?$/;
const HEADING = /^#{1,6} +/;
// A lone `*` between words is arithmetic more often than emphasis.
const INLINE = /(\*\*|(?<![\w*])\*)(?=\S)([^\n]+?)(?<=\S)\1(?![\w*])|(`)([^`\n]+)`/g;
const STRESS = { "**": "strong", "*": "em" };

// Splits text into blocks {kind, head, body, tail}; head + body + tail over all blocks is the text again.
export function blocksOf(text) {
  const blocks = [];
  let open = null;
  for (const line of text.match(/[^\n]*\n|[^\n]+$/g) ?? []) open = takeLine(blocks, open, line);
  return blocks.map(settle);
}

function takeLine(blocks, open, line) {
  if (open?.kind === "code") return takeCode(open, line);
  const fence = FENCE.exec(line);
  if (fence) return begin(blocks, { kind: "code", head: line, body: "", tail: "", fence: fence[1], lang: fence[2].trim() });
  if (HEADING.test(line)) {
    begin(blocks, { kind: "heading", head: "", body: line, tail: "" });
    return null;
  }
  const block = open ?? begin(blocks, { kind: "text", head: "", body: "", tail: "" });
  block.body += line;
  return line.trim() ? block : null;
}

function takeCode(block, line) {
  const closes = FENCE.exec(line);
  if (closes && closes[1].startsWith(block.fence) && !closes[2].trim()) {
    block.tail = line;
    return null;
  }
  block.body += line;
  return block;
}

function begin(blocks, block) {
  blocks.push(block);
  return block;
}

// Newlines around a block are spacing, which the style sheet gives; they move out of the shown body.
function settle(block) {
  if (block.kind === "code") return block;
  const mark = block.kind === "heading" ? HEADING : /^\n*/;
  const head = mark.exec(block.body)[0];
  const body = block.body.slice(head.length).trimEnd();
  return { ...block, head, body, tail: block.body.slice(head.length + body.length) };
}

// Brings `container` up to date with `text`, touching only the blocks that changed.
export function render(container, text) {
  const blocks = blocksOf(text);
  blocks.forEach((block, index) => {
    const raw = block.head + block.body + block.tail;
    const node = nodeFor(container, index, block);
    if (node.textContent !== raw) fill(node, block);
  });
  while (container.children.length > blocks.length) container.lastElementChild.remove();
}

const TAGS = { text: "p", heading: "h4", code: "pre" };

function nodeFor(container, index, block) {
  const tag = TAGS[block.kind];
  const old = container.children[index];
  if (old?.localName === tag) return old;
  const node = document.createElement(tag);
  if (old) old.replaceWith(node);
  else container.append(node);
  return node;
}

function fill(node, block) {
  const parts = block.kind === "code" ? [element("code", block.body)] : inline(block.body);
  node.replaceChildren(...hidden(block.head), ...parts, ...hidden(block.tail));
  if (block.lang) node.dataset.lang = block.lang;
}

function inline(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    const [whole, stars, stressed, tick, code] = match;
    const mark = stars ?? tick;
    const shown = element(STRESS[stars] ?? "code", stressed ?? code);
    parts.push(text.slice(end, match.index), ...hidden(mark), shown, ...hidden(mark));
    end = match.index + whole.length;
  }
  return [...parts, text.slice(end)];
}

function hidden(text) {
  if (!text) return [];
  const mark = element("span", text);
  mark.hidden = true;
  return [mark];
}

function element(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}
