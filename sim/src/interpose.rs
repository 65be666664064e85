//! Interposer of libc's time and entropy, so that a run is a function of its seed.
//!
//! The functions exported here have the names of libc's own. The linker takes a definition in the executable before
//! the one in the shared libc, so every crate in this binary, std included, reads the virtual clock and the seeded
//! stream without knowing it. This is active before `main`, because std draws hash keys as soon as a `HashMap` exists.
//!
//! **Time.** Until [`start_virtual`] the kernel answers. From then on one atomic answers every thread and every clock,
//! wall and monotonic alike; the driver moves it with [`set_virtual`]. It is an atomic, and not a question to tokio's
//! clock, because that clock holds a mutex which itself may ask for the time: a deadlock. Nanoseconds since 1970 are
//! far ahead of the kernel's monotonic clock (time since boot), so an absolute deadline computed from virtual time, as
//! in `Condvar::wait_timeout`, never expires by itself: only a wake-up ends the wait. CPU-time clocks stay real.
//!
//! **Entropy.** It is always deterministic in this binary, before [`set_seed`] too (from seed 0). Requests with
//! `GRND_INSECURE`, which only std's hash keys use, get constant bytes, so that the order in which threads start
//! cannot shift the stream. All else takes from one of two SplitMix64 streams: the main thread, on which the world runs,
//! has its own, and every other thread draws from a second one, since how many threads a pool starts, and when, is a
//! race (rand seeds a generator per thread). What such a thread draws must not matter to a result; the canary tells.
//! Never link this into anything that needs secrets.
//!
//! What it leaves out:
//! - `/dev/urandom` and `/dev/random`: `open` and `read` are not intercepted. getrandom and std read them only if
//!   `getrandom` fails with "not implemented" or "not permitted", which it never does here.
//! - The `rdrand` instruction, system calls made by inline assembly (rustix's `linux_raw`), the vDSO called directly,
//!   `syscall(SYS_clock_gettime)`, and calls inside libc itself, which do not go through the exported names.
//! - Waits by duration (`nanosleep`, `epoll_wait`, a futex with a relative timeout): the kernel counts them in real time.
//! - Thread scheduling: threads that race for the second stream get its bytes in the order of the race.
//! - Memory addresses, from which ahash and foldhash take seeds: see [`disable_aslr_or_continue`].
//! - Processes started from here: the clock is not shared with them. Only the personality and `SIMULACRO_ASLR` reach them.

use std::{
    ffi::{CString, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    ptr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use libc::{c_char, c_int, c_long, c_uint, c_ulong, c_void, clockid_t, size_t, ssize_t, time_t, timespec, timeval};

#[cfg(not(all(target_os = "linux", target_pointer_width = "64", any(target_arch = "x86_64", target_arch = "aarch64"))))]
compile_error!("the interposer knows the system call conventions of 64-bit Linux on x86_64 and aarch64 only");

const NANOS: u64 = 1_000_000_000;
/// Step of SplitMix64: 2^64 divided by the golden ratio.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
/// Each byte of an answer to `GRND_INSECURE`.
const INSECURE_BYTE: u8 = 0x5A;
const GRND_INSECURE: c_uint = 4;
/// The most that `getentropy` gives at once.
const ENTROPY_MAX: size_t = 256;
const ADDR_NO_RANDOMIZE: c_ulong = 0x004_0000;
/// Asks `personality` for the value in force, without a change.
const PERSONALITY_QUERY: c_ulong = 0xffff_ffff;
const ASLR_GUARD: &str = "SIMULACRO_ASLR";
const ASLR_TRIED: &str = "tried";

static VIRTUAL: AtomicBool = AtomicBool::new(false);
static VIRTUAL_NANOS: AtomicU64 = AtomicU64::new(0);
static STREAM: AtomicU64 = AtomicU64::new(0);
/// The stream of every thread but the main one.
static FOREIGN_STREAM: AtomicU64 = AtomicU64::new(FOREIGN_SEED);
/// What the second stream's seed differs by, so that the two never give the same bytes.
const FOREIGN_SEED: u64 = 0x5851_F42D_4C95_7F2D;
static DRAWS: AtomicU64 = AtomicU64::new(0);

// ---- The driver's side

/// Restarts the entropy stream at `seed`, and the count of [`draws`] at zero.
pub fn set_seed(seed: u64) {
    STREAM.store(seed, Ordering::SeqCst);
    FOREIGN_STREAM.store(seed ^ FOREIGN_SEED, Ordering::SeqCst);
    DRAWS.store(0, Ordering::SeqCst);
}

/// Switches all clocks of the process to virtual time, which begins at `nanos` since 1970. There is no way back:
/// an `Instant` of one time would be compared with an `Instant` of the other.
pub fn start_virtual(nanos: u64) {
    VIRTUAL_NANOS.store(nanos, Ordering::SeqCst);
    VIRTUAL.store(true, Ordering::SeqCst);
}

/// Moves virtual time forward to `nanos` since 1970. An earlier time than the present one changes nothing.
pub fn set_virtual(nanos: u64) {
    VIRTUAL_NANOS.fetch_max(nanos, Ordering::SeqCst);
}

/// Virtual time in nanoseconds since 1970; zero before [`start_virtual`].
pub fn virtual_nanos() -> u64 {
    VIRTUAL_NANOS.load(Ordering::SeqCst)
}

/// The kernel's monotonic clock in nanoseconds, even in virtual time: for measuring wall time, never for the world.
pub fn real_nanos() -> u64 {
    let ts = kernel_clock(libc::CLOCK_MONOTONIC);
    ts.tv_sec as u64 * NANOS + ts.tv_nsec as u64
}

/// Number of calls by the main thread which took bytes from its stream since the last [`set_seed`]. Other threads and
/// hash keys do not count: their number depends on how many threads a pool chose to start.
pub fn draws() -> u64 {
    DRAWS.load(Ordering::SeqCst)
}

/// Executes the program again, once, without address space randomisation. Returns true if it is off (the second time
/// through, or if it was off already), and false if that is refused, as in a container with the default seccomp profile:
/// then the run continues, so results must not depend on addresses.
///
/// Call it first in `main`, while there is one thread and nothing is open. `SIMULACRO_ASLR=tried` in the environment
/// marks the second time, so that this cannot loop.
pub fn disable_aslr_or_continue() -> bool {
    let persona = personality(PERSONALITY_QUERY);
    match persona {
        None => return false,
        Some(p) if p & ADDR_NO_RANDOMIZE != 0 => return true,
        Some(_) if std::env::var_os(ASLR_GUARD).is_some_and(|v| v == ASLR_TRIED) => return false,
        Some(p) => {
            if personality(p | ADDR_NO_RANDOMIZE).is_some() {
                execute_again();
                // Still here, so it failed; and without `exec` the new value would only pretend.
                personality(p);
            }
        }
    }
    false
}

/// Sets the process personality and returns the one before; `None` if that is refused.
fn personality(value: c_ulong) -> Option<c_ulong> {
    // SAFETY: takes and returns plain integers; it touches no memory of this process.
    let before = unsafe { libc::personality(value) };
    // Minus one has all bits set, so it must not be taken for a personality.
    (before != -1).then_some(before as c_uint as c_ulong)
}

/// Replaces this process by a new one with the same arguments and environment. Returns only if that failed.
fn execute_again() {
    let strings =
        |items: Vec<OsString>| -> Option<Vec<CString>> { items.into_iter().map(|s| CString::new(s.into_vec()).ok()).collect() };
    let mut variables: Vec<OsString> = std::env::vars_os()
        .filter(|(name, _)| name.as_bytes() != ASLR_GUARD.as_bytes())
        .map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            name
        })
        .collect();
    variables.push(format!("{ASLR_GUARD}={ASLR_TRIED}").into());
    let (Some(arguments), Some(variables)) = (strings(std::env::args_os().collect()), strings(variables)) else {
        return;
    };
    let pointers = |items: &[CString]| -> Vec<*const c_char> { items.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect() };
    let (argv, envp) = (pointers(&arguments), pointers(&variables));
    // SAFETY: the path is a C string; both arrays end with a null pointer, and each pointer before that is a C string
    // owned by `arguments` or `variables`, which live until after the call.
    unsafe { libc::execve(c"/proc/self/exe".as_ptr(), argv.as_ptr(), envp.as_ptr()) };
}

// ---- The kernel's side

/// One system call as the kernel answers it: a result, or an error number negated.
///
/// # Safety
/// The arguments must be right for system call `num`.
unsafe fn raw_syscall(num: c_long, args: [c_long; 6]) -> c_long {
    let result: c_long;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the registers are the kernel's convention; it destroys rcx and r11 only, both declared. Memory counts as
    // changed, as `nomem` is not given. That the arguments are right is the caller's promise.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") num => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the registers are the kernel's convention; it changes x0 only. Memory counts as changed, as `nomem` is
    // not given. That the arguments are right is the caller's promise.
    unsafe {
        std::arch::asm!(
            "svc 0",
            in("x8") num,
            inlateout("x0") args[0] => result,
            in("x1") args[1],
            in("x2") args[2],
            in("x3") args[3],
            in("x4") args[4],
            in("x5") args[5],
            options(nostack),
        );
    }
    result
}

/// Turns the kernel's answer into libc's: errors become -1 and `errno`.
fn libc_result(result: c_long) -> c_long {
    if (-4095..0).contains(&result) {
        set_errno(-result as c_int);
        -1
    } else {
        result
    }
}

fn set_errno(code: c_int) {
    // SAFETY: libc returns a valid pointer to the errno of the calling thread.
    unsafe { *libc::__errno_location() = code };
}

/// The kernel's time by a clock that is known to exist.
fn kernel_clock(clk: clockid_t) -> timespec {
    let mut ts = timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `ts` is a valid timespec for the kernel to write.
    unsafe { raw_syscall(libc::SYS_clock_gettime, [clk.into(), (&raw mut ts) as c_long, 0, 0, 0, 0]) };
    ts
}

/// Virtual time, if it has begun.
fn virtual_clock() -> Option<timespec> {
    VIRTUAL.load(Ordering::SeqCst).then(|| split(virtual_nanos()))
}

/// Nanoseconds as seconds and the rest.
fn split(nanos: u64) -> timespec {
    timespec { tv_sec: (nanos / NANOS) as time_t, tv_nsec: (nanos % NANOS) as c_long }
}

// ---- The entropy stream

/// Output function of SplitMix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Fills `out` from the stream `state`. One step of the state reserves all words of the call, so two threads never share
/// one; what is left of the last word is thrown away.
fn fill(state: &AtomicU64, out: &mut [u8]) {
    let words = out.len().div_ceil(8) as u64;
    let mut at = state.fetch_add(GAMMA.wrapping_mul(words), Ordering::SeqCst);
    for chunk in out.chunks_mut(8) {
        at = at.wrapping_add(GAMMA);
        chunk.copy_from_slice(&mix(at).to_le_bytes()[..chunk.len()]);
    }
}

/// The thread that the process began with has the process' own number.
fn on_main_thread() -> bool {
    // SAFETY: both calls take no arguments and touch no memory.
    unsafe { raw_syscall(libc::SYS_gettid, [0; 6]) == raw_syscall(libc::SYS_getpid, [0; 6]) }
}

/// Answers a request for `len` bytes at `buf`.
///
/// # Safety
/// `buf` must be valid for writes of `len` bytes, unless `len` is zero.
unsafe fn answer(buf: *mut c_void, len: size_t, insecure: bool) {
    // Crates ask for zero bytes at a made-up address to probe whether the call exists.
    if len == 0 {
        return;
    }
    // SAFETY: the caller promises `len` writable bytes, possibly not yet initialised: from here on they are.
    let out = unsafe {
        ptr::write_bytes(buf.cast::<u8>(), INSECURE_BYTE, len);
        std::slice::from_raw_parts_mut(buf.cast::<u8>(), len)
    };
    if !insecure {
        if on_main_thread() {
            fill(&STREAM, out);
            DRAWS.fetch_add(1, Ordering::SeqCst);
        } else {
            fill(&FOREIGN_STREAM, out);
        }
    }
}

// ---- libc's names. None of these may panic, allocate or lock: std calls them from anywhere, also after `fork`.

/// libc's `clock_gettime`: virtual time for every clock once it has begun, except the CPU time of process and thread.
///
/// # Safety
/// As libc's: `ts` is null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clk: clockid_t, ts: *mut timespec) -> c_int {
    let real = matches!(clk, libc::CLOCK_PROCESS_CPUTIME_ID | libc::CLOCK_THREAD_CPUTIME_ID);
    match virtual_clock() {
        Some(now) if !real => {
            if ts.is_null() {
                set_errno(libc::EFAULT);
                return -1;
            }
            // SAFETY: not null, so the caller promises that it may be written.
            unsafe { ts.write(now) };
            0
        }
        // SAFETY: the caller's pointer, passed on as it is; the kernel checks it.
        _ => libc_result(unsafe { raw_syscall(libc::SYS_clock_gettime, [clk.into(), ts as c_long, 0, 0, 0, 0]) }) as c_int,
    }
}

/// libc's `gettimeofday`. The time zone is obsolete: it is answered as UTC, without daylight saving.
///
/// # Safety
/// As libc's: `tv` and `tz` are each null or valid for a write; `tz` points at a `struct timezone`, two C integers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gettimeofday(tv: *mut timeval, tz: *mut c_void) -> c_int {
    let now = virtual_clock().unwrap_or_else(|| kernel_clock(libc::CLOCK_REALTIME));
    if !tv.is_null() {
        // SAFETY: not null, so the caller promises that it may be written.
        unsafe { tv.write(timeval { tv_sec: now.tv_sec, tv_usec: now.tv_nsec / 1_000 }) };
    }
    if !tz.is_null() {
        // SAFETY: not null, so the caller promises a writable `struct timezone`, which is two C integers.
        unsafe { tz.cast::<[c_int; 2]>().write([0, 0]) };
    }
    0
}

/// libc's `time`: whole seconds since 1970, also written to `out` if that is not null.
///
/// # Safety
/// As libc's: `out` is null or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn time(out: *mut time_t) -> time_t {
    let now = virtual_clock().unwrap_or_else(|| kernel_clock(libc::CLOCK_REALTIME));
    if !out.is_null() {
        // SAFETY: not null, so the caller promises that it may be written.
        unsafe { out.write(now.tv_sec) };
    }
    now.tv_sec
}

/// libc's `getrandom`: constant bytes for `GRND_INSECURE`, else bytes of the seeded stream. It never fails, and never
/// gives less than was asked for.
///
/// # Safety
/// As libc's: `buf` is valid for writes of `len` bytes, unless `len` is zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buf: *mut c_void, len: size_t, flags: c_uint) -> ssize_t {
    // SAFETY: the caller's promise is the same.
    unsafe { answer(buf, len, flags & GRND_INSECURE != 0) };
    len as ssize_t
}

/// libc's `getentropy`: bytes of the seeded stream. Fails with `EIO` beyond 256 bytes, as libc's does.
///
/// # Safety
/// As libc's: `buf` is valid for writes of `len` bytes, unless `len` is zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getentropy(buf: *mut c_void, len: size_t) -> c_int {
    if len > ENTROPY_MAX {
        set_errno(libc::EIO);
        return -1;
    }
    // SAFETY: the caller's promise is the same.
    unsafe { answer(buf, len, false) };
    0
}

/// libc's `syscall`: `SYS_getrandom` is answered as [`getrandom`] is, everything else goes to the kernel as it comes
/// (std, tokio and parking_lot make their futex calls through here).
///
/// libc declares it variadic, and stable Rust cannot define such a function. Seven fixed arguments are the same to the
/// callers on Linux x86_64 and aarch64, where a variadic integer or pointer travels like a named one: on x86_64 in six
/// registers and then on the stack (`al`, the number of vector registers, is ignored), on aarch64 all seven in registers.
/// What a caller did not pass is read as whatever is there, and the kernel ignores it; libc's own does the same.
///
/// # Safety
/// As libc's: the arguments must be right for system call `num`. One that returns twice on the same stack (`vfork`, or
/// `clone` with `CLONE_VM` and no stack) cannot be made through here, since this function has a frame.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn syscall(num: c_long, a1: c_long, a2: c_long, a3: c_long, a4: c_long, a5: c_long, a6: c_long) -> c_long {
    if num == libc::SYS_getrandom {
        // SAFETY: the arguments of the system call are those of the function, so the caller's promise is the same.
        return unsafe { getrandom(a1 as *mut c_void, a2 as size_t, a3 as c_uint) } as c_long;
    }
    // SAFETY: the caller promises that the arguments are right for `num`.
    libc_result(unsafe { raw_syscall(num, [a1, a2, a3, a4, a5, a6]) })
}

/// No test here sets the global clock or seed: tests of one binary share them, and run in parallel.
#[cfg(test)]
mod tests {
    use super::*;

    fn stream(seed: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        fill(&AtomicU64::new(seed), &mut out);
        out
    }

    #[test]
    fn hash_keys_are_constant() {
        let (mut a, mut b) = ([0_u8; 16], [1_u8; 16]);
        for out in [&mut a, &mut b] {
            // SAFETY: a buffer of that length.
            assert_eq!(unsafe { getrandom(out.as_mut_ptr().cast(), out.len(), GRND_INSECURE) }, 16);
        }
        assert_eq!(a, b);
        assert_eq!(a, [INSECURE_BYTE; 16]);
    }

    #[test]
    fn raw_getrandom_is_caught() {
        let mut out = [0_u8; 16];
        // SAFETY: a buffer of that length; called by libc's variadic declaration, as other crates do.
        let got = unsafe { libc::syscall(libc::SYS_getrandom, out.as_mut_ptr(), out.len(), GRND_INSECURE) };
        assert_eq!((got, out), (16, [INSECURE_BYTE; 16]));
    }

    #[test]
    fn libc_names_lead_here() {
        let mut out = [0_u8; 16];
        // SAFETY: a buffer of that length.
        let got = unsafe { libc::getrandom(out.as_mut_ptr().cast(), out.len(), GRND_INSECURE) };
        assert_eq!((got, out), (16, [INSECURE_BYTE; 16]));
        for name in [c"clock_gettime", c"gettimeofday", c"time", c"getrandom", c"getentropy", c"syscall"] {
            let ours = match name.to_bytes() {
                b"clock_gettime" => clock_gettime as *const c_void,
                b"gettimeofday" => gettimeofday as *const c_void,
                b"time" => time as *const c_void,
                b"getrandom" => getrandom as *const c_void,
                b"getentropy" => getentropy as *const c_void,
                _ => syscall as *const c_void,
            };
            // SAFETY: a C string. Some crates look names up at run time, so the dynamic table must have ours too.
            let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
            assert!(ptr::eq(found, ours), "{name:?} leads to libc");
        }
    }

    #[test]
    fn same_seed_gives_same_bytes() {
        assert_eq!(stream(7, 100), stream(7, 100));
        assert_ne!(stream(7, 100), stream(8, 100));
        assert_eq!(stream(7, 100)[..13], stream(7, 13));
    }

    #[test]
    fn stream_is_splitmix64() {
        let expected: Vec<u8> =
            [6_457_827_717_110_365_317_u64, 3_203_168_211_198_807_973].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(stream(1_234_567, 16), expected);
    }

    #[test]
    fn calls_continue_the_stream() {
        let state = AtomicU64::new(7);
        let (mut a, mut b) = ([0; 16], [0; 8]);
        fill(&state, &mut a);
        fill(&state, &mut b);
        assert_eq!([&a[..], &b[..]].concat(), stream(7, 24));
    }

    #[test]
    fn another_thread_leaves_the_main_stream_alone() {
        // Tests never run on the main thread.
        assert!(!on_main_thread());
        let (before, mut out) = ((STREAM.load(Ordering::SeqCst), draws()), [0_u8; 8]);
        // SAFETY: a buffer of that length.
        assert_eq!(unsafe { getentropy(out.as_mut_ptr().cast(), out.len()) }, 0);
        assert_eq!((STREAM.load(Ordering::SeqCst), draws()), before);
        assert_ne!(out, [0; 8]);
    }

    #[test]
    fn entropy_beyond_the_limit_fails() {
        let mut out = [0_u8; ENTROPY_MAX + 1];
        // SAFETY: a buffer of that length.
        assert_eq!(unsafe { getentropy(out.as_mut_ptr().cast(), out.len()) }, -1);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EIO));
    }

    #[test]
    fn nothing_asked_nothing_written() {
        // SAFETY: no byte is written, so any address will do.
        assert_eq!(unsafe { getrandom(ptr::null_mut(), 0, 0) }, 0);
    }

    #[test]
    fn syscalls_reach_the_kernel() {
        // SAFETY: no arguments.
        let pid = unsafe { libc::syscall(libc::SYS_getpid) };
        assert_eq!(pid, c_long::from(std::process::id()));
    }

    #[test]
    fn sixth_argument_reaches_the_kernel() {
        // An offset that is no multiple of the page size is refused, zero is not.
        for (offset, good) in [(0 as c_long, true), (1, false)] {
            // SAFETY: a new anonymous mapping of one page, which overlaps nothing.
            let at = unsafe {
                libc::syscall(
                    libc::SYS_mmap,
                    0 as c_long,
                    4096 as c_long,
                    c_long::from(libc::PROT_READ),
                    c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
                    -1 as c_long,
                    offset,
                )
            };
            assert_eq!(at != -1, good);
        }
    }

    #[test]
    fn syscall_errors_set_errno() {
        // SAFETY: closes a descriptor that cannot exist.
        assert_eq!(unsafe { libc::syscall(libc::SYS_close, -1 as c_long) }, -1);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn real_time_moves() {
        let before = real_nanos();
        assert!(before > 0);
        assert!(real_nanos() >= before);
    }

    #[test]
    fn nanoseconds_split() {
        let ts = split(1_700_000_000_123_456_789);
        assert_eq!((ts.tv_sec, ts.tv_nsec), (1_700_000_000, 123_456_789));
    }
}
