// What a reader's browser shows of a report. Every check returns its offenders, a line of text each.
// test_browser.py puts this script into the page before the page's own content.
"use strict";
globalThis.checks = (() => {
  const SMALLEST_FIGURE_TEXT = 11; // CSS px
  const CONTRAST = 4.5; // WCAG 2.2, success criterion 1.4.3
  const CONTRAST_OF_LARGE_TEXT = 3;
  const ROUNDING = 0.5; // px

  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const quoted = (text) => JSON.stringify(text.trim().replace(/\s+/g, " ").slice(0, 50));
  const visible = (element) =>
    element.checkVisibility({ visibilityProperty: true }) && element.getClientRects().length > 0;

  function nameOf(element) {
    const name = element.getAttribute("aria-label") || element.getAttribute("alt");
    return `${element.localName} ${quoted(name || element.textContent)}`;
  }

  // The page itself

  /** Boxes that scroll or cut what is wider than they are, from the inside out. */
  function clippingBoxes(element) {
    const boxes = [];
    for (let box = element.parentElement; box; box = box.parentElement) {
      if (getComputedStyle(box).overflowX !== "visible") boxes.push(box);
    }
    return boxes;
  }

  function sidewaysScroll() {
    const wide = document.scrollingElement.scrollWidth;
    if (wide <= innerWidth) return [];
    const wider = all("body *").filter((element) =>
      element.getBoundingClientRect().right > innerWidth && !clippingBoxes(element).length);
    const innermost = wider.filter((element) => !wider.includes(element.firstElementChild));
    return [`the page is ${wide} px wide, the window ${innerWidth} px`, ...innermost.map(nameOf)];
  }

  function duplicateIds() {
    const ids = all("[id]").map((element) => element.id);
    return [...new Set(ids.filter((id, index) => ids.indexOf(id) !== index))];
  }

  const targetOf = (link) => document.getElementById(decodeURIComponent(link.getAttribute("href").slice(1)));

  function brokenLinks() {
    return all("[href^='#']").filter((link) => !targetOf(link)).map((link) => link.getAttribute("href"));
  }

  const isOnTop = (element) => {
    const { left, right, top, bottom } = element.getClientRects()[0];
    return element.contains(document.elementFromPoint((left + right) / 2, (top + bottom) / 2));
  };

  /** Links of the table of contents that cannot be clicked, or do not show the top of their target. */
  function deadEnds() {
    const links = all("nav a[href^='#']").filter(visible);
    const faults = links.length ? [] : ["there is no table of contents"];
    for (const link of links.filter(targetOf)) {
      link.scrollIntoView({ block: "nearest" });
      if (!isOnTop(link)) faults.push(`${nameOf(link)} is covered`);
      link.click();
      const { top } = targetOf(link).getBoundingClientRect();
      if (top < -ROUNDING || top >= innerHeight) faults.push(`${nameOf(link)} leads to ${Math.round(top)} px`);
    }
    return faults;
  }

  function openDetails() {
    for (const details of all("details")) details.open = true;
  }

  function unreachableByKeyboard() {
    const reached = (summary) => {
      summary.focus({ preventScroll: true });
      return summary.tabIndex >= 0 && document.activeElement === summary;
    };
    return all("summary").filter((summary) => visible(summary) && !reached(summary)).map(nameOf);
  }

  // Pictures

  const isPicture = (element) => element.matches("img, svg") && !element.ownerSVGElement;

  /** Left and right end of what can be seen of `element` without scrolling any box sideways. */
  function room(element) {
    const ends = clippingBoxes(element).map((box) => box.getBoundingClientRect());
    return [Math.max(0, ...ends.map((box) => box.left)), Math.min(innerWidth, ...ends.map((box) => box.right))];
  }

  function cutPictures() {
    const pictures = all("figure :is(svg, img), main :is(svg, img)");
    return pictures.filter((element) => isPicture(element) && visible(element)).flatMap((picture) => {
      const [left, right] = room(picture);
      const ends = picture.getBoundingClientRect();
      if (ends.left >= left - ROUNDING && ends.right <= right + ROUNDING) return [];
      const [from, to, least, most] = [ends.left, ends.right, left, right].map(Math.round);
      return [`${nameOf(picture)} spans ${from} to ${to} px of ${least} to ${most} px`];
    });
  }

  // Text

  /** Elements that hold text of their own which can be seen. */
  function texts() {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = new Set();
    while (walker.nextNode()) {
      if (walker.currentNode.data.trim()) found.add(walker.currentNode.parentElement);
    }
    const silent = "script, style, title, desc, defs";
    return [...found].filter((element) => !element.closest(silent) && visible(element));
  }

  /** Font size in CSS px as drawn, after every viewBox and transform. */
  function sizeOf(text) {
    const size = parseFloat(getComputedStyle(text).fontSize);
    if (!text.ownerSVGElement) return size;
    const { c, d } = text.getScreenCTM();
    return size * Math.hypot(c, d);
  }

  function smallFigureText() {
    const small = texts().filter((text) => text.closest("figure, svg"));
    return small.flatMap((text) => {
      const size = sizeOf(text).toFixed(1);
      return size >= SMALLEST_FIGURE_TEXT ? [] : [`${quoted(text.textContent)} has ${size} px`];
    });
  }

  /** Charts whose letters no check can measure: outlines, and SVG inside an <img>. */
  function chartsWithoutText() {
    const pictures = all("figure :is(svg, img), main :is(svg, img)").filter(visible);
    const isMute = (picture) => picture.localName === "svg" ? !picture.querySelector("text")
      : picture.currentSrc.startsWith("data:image/svg+xml");
    return pictures.filter((picture) => isPicture(picture) && isMute(picture)).map(nameOf);
  }

  // Contrast

  function remembering(compute) {
    const known = new Map();
    return (key) => known.get(key) ?? known.set(key, compute(key)).get(key);
  }

  const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });

  /** Red, green, blue (0 to 255) and alpha (0 to 1) of any computed CSS colour. */
  const rgba = remembering((colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = pen.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  });

  const faded = ([red, green, blue, alpha], opacity) => [red, green, blue, alpha * opacity];
  /** `top`, which may be translucent, painted over the opaque `below`. */
  const over = (top, below) => [...[0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])), 1];

  const opacityOf = remembering((element) =>
    element ? getComputedStyle(element).opacity * opacityOf(element.parentElement) : 1);

  /** The colour a browser gives a page that sets none. */
  function canvasColour() {
    const probe = document.body.appendChild(document.createElement("div"));
    probe.style.backgroundColor = "Canvas";
    const colour = rgba(getComputedStyle(probe).backgroundColor);
    probe.remove();
    return colour;
  }

  /** Opaque background of a box of the page, without background images: edges and shadows here. */
  const boxBackground = remembering((element) => element
    ? over(rgba(getComputedStyle(element).backgroundColor), boxBackground(element.parentElement))
    : canvasColour());

  const centreOf = (element) => {
    const box = element.getBoundingClientRect();
    return [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
  };

  const isShape = (element) => element instanceof SVGGeometryElement || element.matches("use, image");

  function isFilledAt(shape, x, y) {
    if (!(shape instanceof SVGGeometryElement)) return true; // <use>, <image>: all of it was hit
    return shape.isPointInFill(new DOMPoint(x, y).matrixTransform(shape.getScreenCTM().inverse()));
  }

  /** What `picture` painted under the centre of `text`: its shapes, the topmost first. */
  function shapesUnder(text, picture) {
    let [x, y] = centreOf(text);
    if (!document.elementsFromPoint(x, y).includes(picture)) {
      text.scrollIntoView({ block: "center", inline: "center" }); // only the screen can be probed
      [x, y] = centreOf(text);
    }
    const precedes = (shape) => shape.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING;
    return document.elementsFromPoint(x, y).filter((shape) =>
      isShape(shape) && picture.contains(shape) && precedes(shape)
      && getComputedStyle(shape).fill !== "none" && isFilledAt(shape, x, y));
  }

  const isFlat = (shape) => shape.localName !== "image" && !getComputedStyle(shape).fill.startsWith("url");

  /** Colour behind `text`; null where it lies over an image, a gradient or a pattern. */
  function backgroundOf(text) {
    if (!text.ownerSVGElement) return boxBackground(text);
    let picture = text.ownerSVGElement;
    while (picture.ownerSVGElement) picture = picture.ownerSVGElement;
    const shapes = shapesUnder(text, picture);
    if (!shapes.every(isFlat)) return null;
    return shapes.reduceRight((below, shape) => {
      const { fill, fillOpacity } = getComputedStyle(shape);
      return over(faded(rgba(fill), fillOpacity * opacityOf(shape)), below);
    }, boxBackground(picture));
  }

  function luminance([red, green, blue]) {
    const linear = [red, green, blue].map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  }

  function contrastOf(colour, background) {
    const [dark, light] = [luminance(colour), luminance(background)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  }

  const pair = (value) => Math.round(value).toString(16).padStart(2, "0");
  const hex = (colour) => "#" + colour.slice(0, 3).map(pair).join("");

  function lowContrast() {
    return texts().flatMap((text) => {
      const background = backgroundOf(text);
      if (!background) return [`${quoted(text.textContent)} lies over an image, gradient or pattern`];
      const { color, fill, fillOpacity, fontWeight } = getComputedStyle(text);
      const ink = text.ownerSVGElement ? faded(rgba(fill), fillOpacity) : rgba(color);
      const colour = over(faded(ink, opacityOf(text)), background);
      const size = sizeOf(text);
      const isLarge = size >= 24 || (size >= 18.66 && fontWeight >= 700);
      const ratio = contrastOf(colour, background);
      if (ratio >= (isLarge ? CONTRAST_OF_LARGE_TEXT : CONTRAST)) return [];
      return [`${quoted(text.textContent)} ${hex(colour)} on ${hex(background)} is ${ratio.toFixed(2)}`];
    });
  }

  return {
    sidewaysScroll, duplicateIds, brokenLinks, deadEnds, openDetails, unreachableByKeyboard, cutPictures,
    smallFigureText, chartsWithoutText, contrastOf, lowContrast,
  };
})();
